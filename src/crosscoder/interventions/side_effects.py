"""Side effects: what edits do to the prediction of text that has nothing to do with the behaviour.

    KL(clean ‖ edited)   mean over the positions of the text, in nats
    cross-entropy        of the next token, clean and edited, in nats

An edit acts here on every token that could be a row, whatever tokens it selects in dialogues: usually more than an edit
of replies or of some roles alone does, though nothing makes it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from crosscoder.activations import ROLES
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context
from crosscoder.errors import TextError
from crosscoder.interventions.editing import editing
from crosscoder.interventions.edits import Edit
from crosscoder.interventions.prompts import Prompt, Prompts
from crosscoder.interventions.reading import log_probabilities
from crosscoder.interventions.selections import AllTokens
from crosscoder.interventions.subject import Subject

_CHUNK = 256
"""Positions whose distributions are compared at once."""
_KINDS = ("held-out text in which nobody speaks", "held-out text and dialogues", "held-out dialogues")


@dataclass(frozen=True)
class SideEffects:
    """Means over `num_tokens` next tokens (nats): cross-entropy clean and edited, KL(clean ‖ edited).

    `text` says what they were measured on.
    """

    clean: float
    edited: float
    kl: float
    num_tokens: int
    text: str = "other text"


@dataclass(frozen=True)
class UnrelatedText:
    """Contexts to measure side effects on, batch by batch, and what they are, in words."""

    batches: tuple[Prompts, ...]
    kind: str = "other text"

    @classmethod
    def of(
        cls,
        text: AnalysisSet,
        *,
        num_tokens: int = 5000,
        batch_tokens: int = 2048,
        which: Literal["texts", "all"] = "texts",
        seed: int = 0,
    ) -> UnrelatedText:
        """A fixed sample of about `num_tokens` tokens; `texts` leaves out contexts in which anybody speaks."""
        order = torch.randperm(text.num_contexts, generator=torch.Generator().manual_seed(seed)).tolist()
        chosen: list[Prompt] = []
        num_spoken = 0
        for number in order:
            context = text.context(number)
            if len(context) > 1 and (which == "all" or not _spoken(context)):
                chosen.append(Prompt.of(context))
                num_spoken += _spoken(context)
            if sum(map(len, chosen)) >= num_tokens:
                break
        if not chosen:
            raise TextError(
                "expected text in which nobody speaks; this analysis set has only dialogues.",
                hint="Use which='all', or give another AnalysisSet.",
            )
        kind = _KINDS[(num_spoken > 0) + (num_spoken == len(chosen))]
        size = max(1, batch_tokens // max(map(len, chosen)))
        chosen.sort(key=len)
        return cls(tuple(Prompts.of(chosen[start : start + size]) for start in range(0, len(chosen), size)), kind)


@torch.no_grad()
def side_effects(subject: Subject, text: UnrelatedText, edits: Sequence[Edit]) -> SideEffects:
    """What the edits do to the speaker's predictions of `text`."""
    everywhere = [replace(edit, tokens=AllTokens()) for edit in edits]
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in text.batches:
        clean = subject.model.logits(batch.ids, attention_mask=batch.mask)
        with editing(subject.crosscoder, subject.models, everywhere, prompts=batch):
            edited = subject.model.logits(batch.ids, attention_mask=batch.mask)
        predicts = (batch.mask[:, :-1].bool() & batch.mask[:, 1:].bool()).nonzero()
        for chunk in predicts.split(_CHUNK):
            sums += _compared(clean, edited, batch.ids, chunk)
        count += len(predicts)
    return SideEffects(*(sums / count).tolist(), num_tokens=count, text=text.kind)


def _compared(clean: Tensor, edited: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Summed over places (context, position): both losses of the next token, and KL."""
    context, position = places.unbind(1)
    target = ids[context, position + 1].to(clean.device)
    context, position = context.to(clean.device), position.to(clean.device)
    p, q = log_probabilities(clean[context, position]), log_probabilities(edited[context, position])
    losses = (
        cross_entropy(p, target, reduction="sum"),
        cross_entropy(q, target, reduction="sum"),
        kl_div(q, p, reduction="sum", log_target=True),
    )
    return torch.stack([loss.double().cpu() for loss in losses])


def _spoken(context: Context) -> bool:
    return bool(np.isin(context.tokens.roles, [ROLES.index(role) for role in ("system", "user", "assistant")]).any())
