"""Pairs of an a-side and a b-side latent: same direction or not, active on the same rows or not.

With `cos = cos(d_i^a, d_j^b)`, and co-activation as in `co_activation`:

                    same direction (cos >= 0.9)                       other direction
    together        split: one concept counted twice, once for        one context, two directions: a and b react to the
    Jaccard >= 0.5  each model; neither latent is a difference        same text, each in its own way
    apart           decoupled: one concept on rows of its own         (nothing to say: two latents)
    overlap <= 0.1  for each model

A *decoupled* concept is a pair of twins (same direction) that fire apart. Both models have the concept, so that neither
latent is a concept that one of them lacks; what may differ is *where* they use it, and whether it does is asked of the
activations (latent scaling on those rows), not of the code. L1 does not prefer a shared latent to either kind of pair:
`f (‖d^a‖ + ‖d^b‖)` is the same for one latent of both as for two of one each (Minder et al. 2025, section 3.2, call
both latent decoupling). `between` lies between; `rare` is a pair of which one latent is active on fewer units than a
statement needs.

`twin_firing` counts pairs that decoder cosines gave; `co_firing` searches all pairs of two sets by where they fire.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from crosscoder.activations import ActivationSource
from crosscoder.analysis.classes import Twins, source_pair
from crosscoder.analysis.co_activation import CoActivation, CoActivationSums, Unit
from crosscoder.analysis.firing_signatures import FiringSignatures
from crosscoder.analysis.passes import watch
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.crosscoder import Crosscoder
from crosscoder.progress import Progress, silent

log = logging.getLogger(__name__)

FIRING = ("together", "between", "apart", "rare")
"""How a pair fires; `FiringPairs.firing_ids` are indices into this."""
SAME_DIRECTION, TOGETHER, APART, MIN_ACTIVE = 0.9, 0.5, 0.1, 10
MAX_PAIRS = 200_000
_SLACK = 2.0  # standard errors by which an estimate may fall short of the cut and still be counted exactly


@dataclass(frozen=True)
class FiringPairs:
    """Pairs with their cosine and their co-activation; `cosine` is None where the widths differ."""

    a: str
    b: str
    cosine: Float[Tensor, "pairs"] | None
    counts: CoActivation
    firing_ids: Int[Tensor, "pairs"]

    @property
    def same_direction(self) -> Bool[Tensor, "pairs"]:
        """Pairs whose decoder rows point the same way; none where that has no meaning."""
        if self.cosine is None:
            return torch.zeros_like(self.firing_ids, dtype=torch.bool)
        return self.cosine >= SAME_DIRECTION

    @property
    def split(self) -> Bool[Tensor, "pairs"]:
        """Same direction, same rows: one concept counted twice."""
        return self.same_direction & (self.firing_ids == FIRING.index("together"))

    @property
    def decoupled(self) -> Bool[Tensor, "pairs"]:
        """Same direction, other rows."""
        return self.same_direction & (self.firing_ids == FIRING.index("apart"))

    def table(self) -> pa.Table:
        """One row per pair."""
        table = self.counts.table()
        cosine = [None] * table.num_rows if self.cosine is None else self.cosine.tolist()
        columns = {
            "cosine": pa.array(cosine, pa.float32()),
            "firing": pa.array([FIRING[i] for i in self.firing_ids.tolist()], pa.string()),
            "split": pa.array(self.split.tolist(), pa.bool_()),
            "decoupled": pa.array(self.decoupled.tolist(), pa.bool_()),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def to_json(self) -> dict[str, Any]:
        """How many pairs fire how, how many concepts are split and decoupled, and at which cut-offs."""
        found = torch.bincount(self.firing_ids, minlength=len(FIRING)).tolist()
        cuts = {"same_direction": SAME_DIRECTION, "together": TOGETHER, "apart": APART, "min_active": MIN_ACTIVE}
        return {
            "a": self.a,
            "b": self.b,
            "cutoffs": cuts,
            "firing": dict(zip(FIRING, found, strict=True)),
            "num_split": int(self.split.sum()),
            "num_decoupled": int(self.decoupled.sum()),
            **self.counts.to_json(),
        }


def firing_ids(counts: CoActivation) -> Int[Tensor, "pairs"]:
    """How each pair fires, by the cut-offs above."""
    ids = torch.full(counts.num_both.shape, FIRING.index("between"))
    ids[counts.jaccard >= TOGETHER] = FIRING.index("together")
    ids[counts.overlap <= APART] = FIRING.index("apart")
    ids[torch.minimum(counts.num_a, counts.num_b) < MIN_ACTIVE] = FIRING.index("rare")
    return ids


def twin_firing(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    twins: Twins,
    *,
    max_values: Float[Tensor, "latents"] | None = None,
    unit: Unit = "row",
    progress: Progress = silent,
) -> FiringPairs:
    """How twins fire. `max_values`, the latents' largest values (`latents.parquet`), save a pass to find them."""
    if max_values is None:
        max_values = _max_values(crosscoder, activations, progress=progress)
    sums = CoActivationSums(twins.latents_a, twins.latents_b, max_values=max_values, unit=unit)
    watch(crosscoder, activations, [sums], progress=progress)
    return FiringPairs(twins.a, twins.b, twins.cosine.cpu(), sums.result, firing_ids(sums.result))


def co_firing(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    latents: tuple[Int[Tensor, "of_a"], Int[Tensor, "of_b"]],
    *,
    a: str,
    b: str,
    jaccard: float = TOGETHER,
    unit: Unit = "row",
    progress: Progress = silent,
) -> FiringPairs:
    """Pairs of one latent of each set that are active on the same units, whatever their directions.

    Two passes: signatures to find candidates, then exact counts of those; pairs with at least `jaccard` are given, most
    alike first. Of more than `MAX_PAIRS` candidates the most alike are counted, and a warning says so.
    """
    keys = source_pair(crosscoder, a=a, b=b)
    statistics = LatentStatistics(crosscoder.num_latents)
    watched = FiringSignatures(torch.cat(latents), num_latents=crosscoder.num_latents, unit=unit)
    watch(crosscoder, activations, [statistics, watched], progress=progress)
    error = (jaccard * (1 - jaccard) / watched.num_hashes) ** 0.5
    found = watched.similar(*latents, jaccard=max(0.0, jaccard - _SLACK * error))
    if len(found.jaccard) > MAX_PAIRS:
        log.warning("%s pairs may fire together; the %s most alike are counted.", f"{len(found.jaccard):,}", MAX_PAIRS)
    first, second = found.latents_a[:MAX_PAIRS], found.latents_b[:MAX_PAIRS]
    sums = CoActivationSums(first, second, max_values=statistics.max_value, unit=unit)
    watch(crosscoder, activations, [sums], progress=progress)
    counts = sums.result
    kept = counts.jaccard.nan_to_num().argsort(descending=True, stable=True)
    counts = counts.take(kept[counts.jaccard[kept] >= jaccard])
    cosine = pair_cosine(crosscoder, counts.latents_a, counts.latents_b, a=keys[0].key, b=keys[1].key)
    return FiringPairs(keys[0].key, keys[1].key, cosine, counts, firing_ids(counts))


@torch.no_grad()
def pair_cosine(
    crosscoder: Crosscoder, latents_a: Int[Tensor, "pairs"], latents_b: Int[Tensor, "pairs"], *, a: str, b: str
) -> Float[Tensor, "pairs"] | None:
    """`cos(d_i^a, d_j^b)` of every pair; None where the sources differ in width."""
    if crosscoder.writes[a].width != crosscoder.writes[b].width:
        return None
    rows_a, rows_b = crosscoder.decoder_rows(a).cpu(), crosscoder.decoder_rows(b).cpu()
    return cosine_similarity(rows_a[latents_a], rows_b[latents_b], dim=1)


def _max_values(
    crosscoder: Crosscoder, activations: ActivationSource, *, progress: Progress
) -> Float[Tensor, "latents"]:
    statistics = LatentStatistics(crosscoder.num_latents)
    watch(crosscoder, activations, [statistics], progress=progress)
    return statistics.max_value
