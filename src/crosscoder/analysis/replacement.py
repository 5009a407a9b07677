"""The replacement model: every source that a transcoder writes is replaced at once, in one running forward.

    at a site that is read     x_s is recorded, as the already patched forward has it
    at a site that is written  x_s := x̂_s, from what was recorded up to there

so that errors of early layers reach later reads, as they would in circuits drawn through the transcoder. Reported
beside the clean model: cross-entropy, the fraction of next tokens on which both have one favourite, and
KL(clean ‖ replaced).
Defined where some source is written but not read, all sources are of one model, and every group writes at or after what
it reads. Source: Ameisen et al. 2025 (replacement model; there with error nodes, here without).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from crosscoder.analysis.cross_entropy import TokenBatch, token_batches
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import Replacement as Rewrite
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import TopK
from crosscoder.progress import Progress, silent
from crosscoder.sources import site_order

_CHUNK = 256
"""Positions whose logits are compared at once."""


@dataclass(frozen=True)
class ReplacementModel:
    """Mean next-token cross-entropy (nats), clean and replaced, agreement on the favourite token, and KL (nats)."""

    clean: float
    replaced: float
    top1_agreement: float
    kl: float
    num_tokens: int


def replacement_model(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    num_tokens: int = 20_000,
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> ReplacementModel | None:
    """The replacement model on about `num_tokens` tokens of `text`; None where it is not defined."""
    if not is_defined(crosscoder):
        return None
    model = models[crosscoder.sources.models[0]]
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    batches = token_batches(text, num_tokens=num_tokens, batch_tokens=batch_tokens)
    for done, batch in enumerate(batches, start=1):
        sums += _compare(crosscoder, model, batch)
        count += int(batch.mask[:, 1:].sum())
        progress("running the replacement model", done, len(batches))
    clean, replaced, agreed, divergence = (sums / count).tolist()
    return ReplacementModel(clean, replaced, agreed, divergence, count)


def is_defined(crosscoder: Crosscoder) -> bool:
    """Whether the wiring has a replacement model: causal, of one model, with something written that is not read.

    Layers that share the k of a TopK compete for it, also with those that are still to come: that has none either.
    """
    sources = crosscoder.sources
    unread = [key for key in crosscoder.writes.keys if key not in crosscoder.reads]
    causal = all(
        site_order(sources[read].site) <= site_order(sources[written].site)
        for group in crosscoder.wiring
        for read in group.reads
        for written in group.writes
    )
    competes = isinstance(crosscoder.nonlinearity, TopK) and any(len(b.groups) > 1 for b in crosscoder.budgets)
    derived = any(source.difference is not None for source in sources)
    return bool(unread) and causal and not competes and not derived and len(sources.models) == 1


@torch.no_grad()
def _compare(crosscoder: Crosscoder, model: StudiedModel, batch: TokenBatch) -> Float[Tensor, "4"]:
    """Summed over next tokens: clean loss, replaced loss, agreement, KL."""
    clean = model.logits(batch.ids, attention_mask=batch.mask)
    with _Running(crosscoder, batch).replaced(model):
        replaced = model.logits(batch.ids, attention_mask=batch.mask)
    sums = torch.zeros(4, dtype=torch.float64)
    for chunk in batch.mask[:, 1:].nonzero().split(_CHUNK):
        context, position = chunk.unbind(1)
        target = batch.ids[context, position + 1].to(clean.device)
        context, position = context.to(clean.device), position.to(clean.device)
        sums += _differences(clean[context, position].float(), replaced[context, position].float(), target)
    return sums


def _differences(clean: Tensor, replaced: Tensor, target: Tensor) -> Float[Tensor, "4"]:
    p, q = clean.log_softmax(1), replaced.log_softmax(1)
    found = (
        cross_entropy(clean, target, reduction="sum"),
        cross_entropy(replaced, target, reduction="sum"),
        (p.argmax(1) == q.argmax(1)).sum(),
        kl_div(q, p, reduction="sum", log_target=True),
    )
    return torch.stack([value.double().cpu() for value in found])


class _Running:
    """One forward pass under way: what has been read so far, on the rows that are kept."""

    def __init__(self, crosscoder: Crosscoder, batch: TokenBatch) -> None:
        self.crosscoder, self.kept = crosscoder, batch.kept
        unseen = crosscoder.mean_columns(crosscoder.reads)
        rows = {key: unseen[columns] for key, columns in crosscoder.reads.slices.items()}
        num_rows = int(batch.kept.sum())
        self.seen = {key: mean.expand(num_rows, -1) for key, mean in rows.items()}

    def replaced(self, model: StudiedModel) -> ExitStack:
        """A context in which the model's forward is patched at every source."""
        with ExitStack() as stack:
            for source in self.crosscoder.sources:
                stack.enter_context(model.replace(source.site, self._at(source.key)))
            return stack.pop_all()

    def _at(self, key: str) -> Rewrite:
        def rewrite(x: Tensor, position_ids: Tensor) -> Tensor:
            kept = self.kept.to(x.device)
            if key in self.seen:
                self.seen[key] = x[kept].to(self.crosscoder.mean)
            if key not in self.crosscoder.writes:
                return x
            new = x.clone()
            new[kept] = self._reconstructed(key).to(x)
            return new

        return rewrite

    def _reconstructed(self, key: str) -> Tensor:
        """`x̂` at one source: groups that have yet to read do not write it."""
        x = self.crosscoder.reads.pack(self.seen)
        return self.crosscoder(x)[:, self.crosscoder.writes.slices[key]]
