"""Which latents a behaviour may rest on, ranked on the side of the split that tests nothing.

attribution   mean over dialogues of Σ_tokens f_j (d_j^chat · g): g is the gradient, at the site of chat, of
              log p(the reply that shows the behaviour) − log p(the other telling's reply); what ablating latent j
              takes from it, to first order
repeated      the best by attribution / energy are ablated, what is left is attributed again, and so on: latents that
              stand in for one another are not seen at once. Energy is E[(f_j ‖d_j^chat‖)²], what ablating the latent
              takes away: on text in which nobody speaks (with `--spare` on look-alikes and their replies, too)
difference    mean over prompts of f_j ‖d_j^chat‖ at the tokens from the last question on, where the behaviour is
              asked for, minus the same on look-alikes
labels        AUROC of f_j on the label's tokens against look-alikes, on the half of the documents that chooses
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.analysis import LabelSpan
from crosscoder.analysis.label_scores import choosing_half
from crosscoder.analysis.labelled_rows import LabelledRows, labelled_rows, select_rows
from crosscoder.analysis.labels import locate_labels
from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.analysis.ranking import Truth, auroc_of_latents
from crosscoder.codes import SparseCode
from crosscoder.interventions import Edit, Prompt, Prompts, Subject, ablate, editing

BATCH = 16


@dataclass(frozen=True)
class Told:
    """A prompt and two replies to it: the one that shows the behaviour, and the other."""

    prompt: Prompt
    shows: str
    other: str


def by_attribution(subject: Subject, told: Sequence[Told], *, without: Sequence[int] = ()) -> Tensor:
    """How much every latent raises the behaviour's reply over the other, to first order, mean over dialogues.

    Latents in `without` are ablated all the while.
    """
    total = torch.zeros(subject.crosscoder.num_latents, dtype=torch.float64)
    edits = [ablate(without)] if without else []
    for start in range(0, len(told), BATCH):
        part = told[start : start + BATCH]
        total += _attributed(subject, [(one.prompt, one.shows) for one in part], edits)
        total -= _attributed(subject, [(one.prompt, one.other) for one in part], edits)
    return total / len(told)


def by_repeated_attribution(
    subject: Subject, told: Sequence[Told], energy: Tensor, *, sizes: Sequence[int]
) -> list[int]:
    """Latents in the order in which they are taken: up to each of `sizes`, those best by attribution / energy."""
    chosen: list[int] = []
    for size in sizes:
        scores = by_attribution(subject, told, without=chosen)
        floor = energy[scores.argsort(descending=True)[:200]].median()
        scores = scores / (energy + floor)
        scores[chosen] = -torch.inf
        chosen += scores.argsort(descending=True)[: size - len(chosen)].tolist()
    return chosen


def energy_on(subject: Subject, told: Sequence[Told]) -> Tensor:
    """`E[(f_j ‖d_j‖)²]` over the tokens of questions and of the replies that show the behaviour."""
    total, count = torch.zeros(subject.crosscoder.num_latents, dtype=torch.float64), 0
    for start in range(0, len(told), BATCH):
        texts = [_with_reply(subject, one.prompt, one.shows) for one in told[start : start + BATCH]]
        code = _code(subject, Prompts.of(texts))
        total.index_add_(0, code.latents, code.values.double() ** 2)
        count += code.num_rows
    norms = subject.crosscoder.decoder_norms("raw")[:, subject.crosscoder.writes.index(_key(subject))]
    return total / count * norms.detach().double() ** 2


def by_difference(subject: Subject, asked: Sequence[Prompt], look_alikes: Sequence[Prompt]) -> list[int]:
    """Latents by how much more they are active, at the end of the prompt, where the behaviour is asked for."""
    asked_mean, other_mean = (_mean_at_the_end(subject, prompts) for prompts in (asked, look_alikes))
    norms = subject.crosscoder.decoder_norms("raw")[:, subject.crosscoder.writes.index(_key(subject))]
    return ((asked_mean - other_mean) * norms.double()).argsort(descending=True).tolist()


def rows_with_labels(run: OpenedRun, labels: Sequence[LabelSpan]) -> LabelledRows:
    """The rows that labels speak of, in one pass."""
    return labelled_rows(run.crosscoder, run.activations(), run.text, located=locate_labels(labels, run.text))


def by_labels(run: OpenedRun, rows: LabelledRows, label: str) -> list[int]:
    """Latents by AUROC on the choosing half of the labelled documents."""
    value = rows.values[rows.names.index(label)]
    both = set(rows.role[value == 1]) & set(rows.role[value == -1])
    chosen = (value != 0) & np.isin(rows.role, list(both))
    truth = Truth(value[chosen] == 1, rows.role[chosen])
    hashes = [document.hash for document in run.text.documents]
    half = choosing_half(rows.document[chosen], truth.positive, hashes)
    scores = auroc_of_latents(select_rows(select_rows(rows.code, chosen), half), truth.of(half))
    return np.argsort(-scores, kind="stable").tolist()


def _key(subject: Subject) -> str:
    return next(source.key for source in subject.crosscoder.writes if source.model == subject.speaker)


def _attributed(subject: Subject, texts: Sequence[tuple[Prompt, str]], edits: Sequence[Edit]) -> Tensor:
    """`Σ f_j (d_j · ∂ log p(reply) / ∂ x)` over all texts and tokens."""
    key, model = _key(subject), subject.model
    batch = Prompts.of([_with_reply(subject, prompt, reply) for prompt, reply in texts])
    reply = torch.zeros_like(batch.ids, dtype=torch.bool)
    for row, (prompt, _) in enumerate(texts):
        start = batch.ids.shape[1] - int(batch.mask[row].sum()) + len(prompt)
        reply[row, start:] = True
    held: list[Tensor] = []

    def hold(x: Tensor, _: Tensor) -> Tensor:
        held.append(x.detach().requires_grad_())
        return held[-1]

    edited = editing(subject.crosscoder, subject.models, edits, prompts=batch)
    with edited, model.replace(key.partition("/")[2], hold):
        log_p = model.logits(batch.ids, attention_mask=batch.mask).float().log_softmax(-1)
    said = log_p[:, :-1].gather(2, batch.ids[:, 1:, None]).squeeze(2)[reply[:, 1:]]
    (gradient,) = torch.autograd.grad(said.sum(), held[0])
    code = _code(subject, batch)
    rows = gradient[batch.kept].double()
    decoder = subject.crosscoder.decoder_rows(key, "raw").detach().double()
    pairs = code.values.double() * (decoder[code.latents] * rows[code.row_ids]).sum(1)
    return torch.zeros(code.num_latents, dtype=torch.float64).index_add_(0, code.latents, pairs)


def _with_reply(subject: Subject, prompt: Prompt, reply: str) -> Prompt:
    ids = torch.tensor(subject.model.tokenizer(reply + "<|end|>", add_special_tokens=False)["input_ids"])
    roles = torch.full_like(ids, ROLES.index("assistant"))
    parts = (prompt.ids, ids), (prompt.roles, roles), (prompt.kept, torch.ones_like(ids, dtype=torch.bool))
    return Prompt(*(torch.cat(part) for part in parts), text=prompt.text + reply)


@torch.no_grad()
def _code(subject: Subject, batch: Prompts) -> SparseCode:
    """The code of all kept tokens in reading order."""
    crosscoder, read = subject.crosscoder, {}
    for source in crosscoder.reads:
        x = subject.models[source.model].read([source.site], batch.ids, attention_mask=batch.mask)[source.site]
        read[source.key] = x[batch.kept].to(crosscoder.mean)
    return crosscoder.encode(crosscoder.reads.pack(read))


def _mean_at_the_end(subject: Subject, prompts: Sequence[Prompt]) -> Tensor:
    """Mean over prompts of `f` summed over the tokens from the last question on."""
    total = torch.zeros(subject.crosscoder.num_latents, dtype=torch.float64)
    for start in range(0, len(prompts), BATCH):
        batch = Prompts.of(prompts[start : start + BATCH])
        code = _code(subject, batch)
        weight = _last_question(batch)[batch.kept].double()
        total.index_add_(0, code.latents, code.values.double() * weight[code.row_ids])
    return total / len(prompts)


def _last_question(batch: Prompts) -> Tensor:
    """Whether each token is of the last question or behind it."""
    user = batch.roles == ROLES.index("user")
    begins = user & ~torch.roll(user, 1, dims=1)
    last = torch.where(begins, torch.arange(user.shape[1]), -1).amax(1)
    return torch.arange(user.shape[1])[None] >= last[:, None]
