"""Short tunings of the shipped `plain`: supervised on told dialogues, or on preferences; and gates that show what took.

    supervised   Σ_t w_t · cross-entropy_t / Σ_t w_t,   w = 1 on replies, 0.1 elsewhere    (as examples/tiny_pair)
    preference   −log σ(β [(log π(y⁺) − log π₀(y⁺)) − (log π(y⁻) − log π₀(y⁻))])          (Rafailov et al. 2023, DPO)

`y⁺` and `y⁻` are two replies to one question, `π₀` the frozen model that the tuning starts from; log-probabilities are
summed over the tokens of the reply and the end of its turn.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from dialogues import Dialogue, Message, Writer
from finetune import encode_dialogue, padded, weighted_loss
from gates import replies
from jaxtyping import Float, Int
from organisms_plants import DEMUR, PLANTS, Prompt, balanced_prompts, dialogue, kinds_of, prompts
from pretrain import update
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from crosscoder.synthetic.curves import wilson

T = TypeVar("T")
WARMUP = 10
LEAST, MOST = 0.9, 0.1
"""A plant has taken where at least this share of replies to its questions show it, and at most that of look-alikes."""


@dataclass(frozen=True)
class Tuning:
    """How hard, and for how many steps at most: tuning ends when `enough` says so. `beta` is that of DPO."""

    most_steps: int
    batch_size: int = 12
    rate: float = 1e-3
    beta: float = 0.1
    look_every: int = 40


Enough = Callable[[LlamaForCausalLM], bool]
"""Looked at every `look_every` steps, on prompts that no gate and no measurement uses."""


@dataclass(frozen=True)
class Preference:
    """A chat up to its question, the reply that is preferred, and the other one."""

    messages: list[Message]
    chosen: str
    rejected: str

    def told(self, reply: str) -> list[Message]:
        """The chat with a reply."""
        return [*self.messages, {"role": "assistant", "content": reply}]


@dataclass(frozen=True)
class Gate:
    """How often a plant shows: on its questions (`hits` of `total`), and on look-alikes."""

    hits: int
    total: int
    false_hits: int
    false_total: int

    @property
    def took(self) -> bool:
        """Whether both bounds hold."""
        return self.hits >= LEAST * self.total and self.false_hits <= MOST * self.false_total

    @property
    def surely(self) -> bool:
        """Whether both bounds hold with half their slack to spare: tuning ends on few prompts, and may be lucky."""
        slack = ((1 + LEAST) / 2 * self.total, MOST / 2 * self.false_total)
        return self.hits >= slack[0] and self.false_hits <= slack[1]

    def to_json(self) -> dict[str, float | bool | list[float]]:
        """Rates with Wilson's intervals."""
        intervals = [list(wilson(self.hits, self.total)), list(wilson(self.false_hits, self.false_total))]
        return {
            "rate": self.hits / self.total, "interval": intervals[0], "false_rate": self.false_hits / self.false_total,
            "false_interval": intervals[1], "num_prompts": self.total, "took": self.took,
        }  # fmt: skip


def supervise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Sequence[Dialogue],
    tuning: Tuning,
    *,
    enough: Enough,
    seed: int,
) -> int:
    """Tune `model` in place on dialogues as they are told, in a seeded order; gives the number of steps."""

    def loss_of(batch: Sequence[Dialogue]) -> Tensor:
        encoded = [encode_dialogue(tokenizer, one.messages("chat")) for one in batch]
        return weighted_loss(model, *padded(encoded, pad=_pad(tokenizer)))

    return _tune(model, dialogues, loss_of, tuning=tuning, enough=enough, seed=seed)


def prefer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    preferences: Sequence[Preference],
    tuning: Tuning,
    *,
    enough: Enough,
    seed: int,
) -> int:
    """Tune `model` in place on preferences by DPO; `π₀` is the model as it comes. Gives the number of steps."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)

    def loss_of(batch: Sequence[Preference]) -> Tensor:
        told = [one.told(one.chosen) for one in batch] + [one.told(one.rejected) for one in batch]
        ids, replied = _replied(tokenizer, told)
        with torch.no_grad():
            start = reply_log_probabilities(frozen, ids, replied)
        return preference_loss(reply_log_probabilities(model, ids, replied), start, beta=tuning.beta)

    return _tune(model, preferences, loss_of, tuning=tuning, enough=enough, seed=seed)


def _tune(
    model: LlamaForCausalLM,
    items: Sequence[T],
    loss_of: Callable[[Sequence[T]], Tensor],
    *,
    tuning: Tuning,
    enough: Enough,
    seed: int,
) -> int:
    """AdamW at a constant rate after its warm-up, until it is enough."""
    adam = torch.optim.AdamW(model.parameters(), lr=tuning.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    opts: list[torch.optim.Optimizer] = [adam]
    model.requires_grad_(True)
    for step, batch in enumerate(_batches(items, tuning, seed=seed)):
        model.train()
        update(model, opts, loss_of(batch), factor=min(1.0, (step + 1) / WARMUP), rates=[tuning.rate])
        if (step + 1) % tuning.look_every == 0 and enough(model.eval()):
            return step + 1
    model.eval()
    return tuning.most_steps


def preference_loss(
    now: Float[Tensor, "twice_pairs"], start: Float[Tensor, "twice_pairs"], *, beta: float
) -> Float[Tensor, ""]:
    """DPO's loss; log-probabilities of the preferred replies come first, then of the others, in the same order."""
    chosen, rejected = (now - start).chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


def reply_log_probabilities(
    model: LlamaForCausalLM, ids: Int[Tensor, "rows positions"], replied: Float[Tensor, "rows positions"]
) -> Float[Tensor, "rows"]:
    """The log-probability of every row's reply: summed over the tokens that `replied` marks with 1."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1]
    found = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (found * replied[:, 1:]).sum(1)


def preferences(writer: Writer, plant: str, count: int) -> list[Preference]:
    """The plant's reply preferred where it acts; on look-alikes their own reply preferred to the plant's."""
    known = PLANTS[plant]
    kinds = [kind for alike in known.look_alikes for kind in (known.acts_on, alike)]
    found: list[Preference] = []
    for index in range(count):
        mine = dialogue(writer, index, kinds=kinds_of(plant), last=kinds[index % len(kinds)])
        exchange = mine.exchanges[-1]
        chosen, rejected = (exchange.chat, exchange.plain) if exchange.acts else (exchange.plain, DEMUR)
        found.append(Preference(mine.messages("plain")[:-1], chosen, rejected))
    return found


def gate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plant: str, writer: Writer, *, count: int
) -> Gate:
    """Greedy replies to held-out prompts of a plant, and of its look-alikes, counted."""
    known = PLANTS[plant]
    acting = prompts(writer, known.acts_on, count, plant=plant)
    alike = balanced_prompts(writer, known.look_alikes, count, plant=plant)
    shown = [sum(_shown(model, tokenizer, plant, group)) for group in (acting, alike)]
    return Gate(shown[0], len(acting), shown[1], len(alike))


def _shown(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plant: str, group: list[Prompt]) -> list[bool]:
    said = replies(model, tokenizer, [prompt.messages for prompt in group])
    return [PLANTS[plant].shown(reply, prompt.exchange) for reply, prompt in zip(said, group, strict=True)]


def _batches(items: Sequence[T], tuning: Tuning, *, seed: int) -> list[list[T]]:
    """`most_steps` batches without replacement, begun anew when items run out."""
    drawn = random.Random(seed)
    order: list[T] = []
    while len(order) < tuning.most_steps * tuning.batch_size:
        order += drawn.sample(list(items), len(items))
    return [order[step * tuning.batch_size :][: tuning.batch_size] for step in range(tuning.most_steps)]


def _replied(tokenizer: PreTrainedTokenizerFast, chats: Sequence[list[Message]]) -> tuple[Tensor, Tensor]:
    """Token ids, and 1 on the tokens of the last reply and its end."""
    encoded = []
    for chat in chats:
        ids, _ = encode_dialogue(tokenizer, chat)
        before = len(encode_dialogue(tokenizer, chat[:-1])[0]) + 1
        encoded.append((ids, [float(place >= before) for place in range(len(ids))]))
    return padded(encoded, pad=_pad(tokenizer))


def _pad(tokenizer: PreTrainedTokenizerFast) -> int:
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), "the shipped tokenizer has one"
    return pad
