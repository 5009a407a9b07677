"""A subject: a crosscoder, the models that it is of, and the one of them that speaks; and what it says under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.recorded import check_recorded
from crosscoder.capture.text import Drop
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, EditError, UnknownSource
from crosscoder.interventions.codes import check_models
from crosscoder.interventions.editing import MetTokens, editing, refuse_unused
from crosscoder.interventions.edits import Edit
from crosscoder.interventions.prompts import Content, Prompt, Prompts, batches, read_prompt
from crosscoder.interventions.selections import SeenTokens


@dataclass(frozen=True)
class Sampling:
    """How replies are generated: greedy, or `num_samples` a prompt drawn at a temperature, the same for every dose."""

    max_new_tokens: int = 60
    num_samples: int = 1
    temperature: float | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_samples < 1 or self.batch_size < 1:
            raise ConfigError("expected at least one new token, one sample and one text in a batch.")
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(
                f"expected a temperature above 0; got {self.temperature}.", hint="Leave it out to generate greedily."
            )
        if self.num_samples > 1 and self.temperature is None:
            raise ConfigError(
                f"greedy replies are all the same: {self.num_samples} samples of a prompt need a temperature.",
                hint="Give one, such as 1.0.",
            )


@dataclass(frozen=True)
class Subject:
    """A crosscoder, its models by alias, and which of them speaks; `drop` names tokens that edits never touch.

    Raises ModelMismatch where a model is not the one that the crosscoder was trained on, UnknownSource for a speaker
    that is not among the models, and EditError where a model is missing.
    """

    crosscoder: Crosscoder
    models: Mapping[str, StudiedModel]
    speaker: str
    drop: tuple[Drop, ...] = ("bos", "pad")

    def __post_init__(self) -> None:
        aliases = self.crosscoder.sources.underlying.models
        if self.speaker not in aliases:
            raise UnknownSource(
                f"expected a model of this crosscoder to speak; got {self.speaker!r}.",
                details=[f"it has  {alias}" for alias in aliases],
                hint="Name one of these.",
            )
        check_models(self.crosscoder, self.models)
        check_recorded({alias: self.models[alias] for alias in aliases}, self.crosscoder.provenance)

    @property
    def model(self) -> StudiedModel:
        """The model that speaks."""
        return self.models[self.speaker]

    def prompt(self, content: Content) -> Prompt:
        """A text or a dialogue as the speaker's own tokenizer and chat template render it."""
        return read_prompt(content, self.model.tokenizer, drop=self.drop)

    def check(self, edits: Sequence[Edit]) -> None:
        """Raises EditError or UnknownLatent for an edit that cannot be made, or that leaves the speaker as it is."""
        for edit in edits:
            if all(source.model != self.speaker for source in edit.edited_sources(self.crosscoder)):
                raise EditError(
                    f"an edit changes nothing that {self.speaker} says: its sources are all of other models.",
                    details=[f"sources  {', '.join(edit.sources or ())}"],
                    hint=f"Other models run clean beside the speaker. Edit sources of {self.speaker}.",
                )

    def replies(self, prompts: Sequence[Prompt], edits: Sequence[Edit], sampling: Sampling) -> list[str]:
        """What the speaker replies under the edits: all samples of the first prompt, then of the next.

        Raises EmptySelection for an edit that met no token of any prompt or reply, nor would have met one of a longer
        reply.
        """
        self.check(edits)
        met = MetTokens()
        repeated = [prompt for prompt in prompts for _ in range(sampling.num_samples)]
        found = [""] * len(repeated)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            for numbers in batches(repeated, sampling.batch_size):
                said = self._said([repeated[number] for number in numbers], edits, sampling, met=met)
                for number, text in zip(numbers, said, strict=True):
                    found[number] = text
        refuse_unused([edit for edit in met.missed(edits) if not _could_meet(edit, prompts, sampling)])
        return found

    def _said(
        self, prompts: Sequence[Prompt], edits: Sequence[Edit], sampling: Sampling, *, met: MetTokens
    ) -> list[str]:
        tokenizer = self.model.tokenizer
        batch = Prompts.of(prompts, pad=_padding(tokenizer))
        stop = _special(tokenizer)
        in_force = editing(self.crosscoder, self.models, edits, prompts=batch, met=met) if edits else nullcontext()
        with in_force:
            ids = self.model.generate(
                batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                stop=stop,
            )
        new = ids[:, batch.ids.shape[1] :].cpu()
        return [str(tokenizer.decode(_until(row, stop))).strip() for row in new]


def _could_meet(edit: Edit, prompts: Sequence[Prompt], sampling: Sampling) -> bool:
    """Whether an edit selects a token of a reply as long as it may become; the last token is never read again."""
    reply = torch.arange(sampling.max_new_tokens - 1).expand(len(prompts), -1)
    position = reply + torch.tensor([len(prompt) for prompt in prompts])[:, None]
    role = torch.full_like(reply, ROLES.index("assistant"))
    return bool(edit.tokens.mask(SeenTokens(position, role, reply)).any())


def _padding(tokenizer: Tokenizer) -> int:
    """The token that fills up; any will do, since it is masked."""
    found: Any = tokenizer.pad_token_id
    return found if isinstance(found, int) else 0


def _special(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that no one says: the end of a text, and what separates turns."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


def _until(ids: Tensor, stop: Sequence[int]) -> Tensor:
    """The tokens before the first that ends a reply."""
    ends = torch.isin(ids, torch.tensor(stop)).nonzero().squeeze(1)
    return ids[: int(ends[0])] if len(ends) else ids
