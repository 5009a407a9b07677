"""Source activity: which of the sources that a latent reads actually drive it.

A decoder can span all sources while the value comes from one of them. The encoder is linear before the nonlinearity,
so on every row where latent i is active (`x̃_s` in normalised space, `e_i^s` its encoder at source s)

    f_i = Σ_s x̃_s · e_i^s + b_i                 contribution_i^s = mean of x̃_s · e_i^s over those rows
    f_i^{−s} = max(0, f_i − x̃_s · e_i^s)        the value with source s at zero: at its mean, in raw space
    activity_i^s = Σ |f_i − f_i^{−s}| / Σ f_i                             relative change, as a ratio of sums
    share_i^s = activity_i^s / Σ_t activity_i^t
    coherence_i = Σ_s activity_i^s / max_s activity_i^s                   1: one source alone; S: all S alike

fmxcoders (functional coherence). Deviations: the value without s is not put through selection or thresholds again, at
which any source could tip a latent over into 1; and sums are divided, not averaged over rows, so that rows on which the
latent is barely active do not count most. Activity can exceed 1 where sources oppose one another. NaN (null) where a
latent does not read a source, or was never active.

One pass; products are of active pairs only, and what is kept is a few numbers per latent and source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import ActivationSource, Batch
from crosscoder.analysis.passes import watch
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.groups import Columns, GroupLayout, GroupWeights
from crosscoder.progress import Progress, silent

DRIVES = 0.5
"""Of the largest activity: a source with as much drives the latent, unless another cut is given."""


@dataclass(frozen=True)
class SourceActivity:
    """How much each read source moves each latent, over the rows on which it is active."""

    sources: tuple[str, ...]
    activity: Float[Tensor, "latents sources"]
    contribution: Float[Tensor, "latents sources"]
    mean_value: Float[Tensor, "latents"]
    num_active: Int[Tensor, "latents"]

    @property
    def share(self) -> Float[Tensor, "latents sources"]:
        """Each source's part of the latent's whole activity."""
        return self.activity / self.activity.nansum(1, keepdim=True)

    @property
    def coherence(self) -> Float[Tensor, "latents"]:
        """How many sources, in effect, drive the latent; NaN for one that was never active."""
        return self.activity.nansum(1) / self.activity.nan_to_num().amax(1)

    @property
    def strongest(self) -> Int[Tensor, "latents"]:
        """The source with the largest activity; −1 for a latent that was never active."""
        return torch.where(self.num_active > 0, self.activity.nan_to_num().argmax(1), -1)

    def drives(self, cut: float = DRIVES) -> Bool[Tensor, "latents sources"]:
        """Which sources have at least `cut` of the latent's largest activity."""
        top = self.activity.nan_to_num().amax(1, keepdim=True)
        return (self.activity >= cut * top) & (top > 0)

    def table(self) -> pa.Table:
        """One row per latent: coherence, the strongest source, and activity, share, contribution of each."""
        names = [self.sources[place] if place >= 0 else None for place in self.strongest.tolist()]
        columns: dict[str, Any] = {
            "latent": pa.array(range(len(self.num_active)), pa.int32()),
            "num_active": pa.array(self.num_active.numpy()),
            "coherence": _column(self.coherence),
            "strongest": pa.array(names, pa.string()),
            "num_driving": pa.array(self.drives().sum(1).int().numpy()),
        }
        for name in ("activity", "share", "contribution"):
            parts = getattr(self, name).T
            columns |= {f"{name}/{key}": _column(part) for key, part in zip(self.sources, parts, strict=True)}
        return pa.table(columns)

    def to_json(self) -> dict[str, Any]:
        """Median coherence, and how many active latents are driven by how many sources, and by which most."""
        active = self.num_active > 0
        strongest = torch.bincount(self.strongest[active], minlength=len(self.sources)).tolist()
        driving = torch.bincount(self.drives()[active].sum(1), minlength=len(self.sources) + 1).tolist()
        return {
            "sources": list(self.sources),
            "drives_at": DRIVES,
            "num_active_latents": int(active.sum()),
            "median_coherence": float(self.coherence[active].median()) if active.any() else None,
            "num_latents_by_driving_sources": driving,
            "num_latents_by_strongest": dict(zip(self.sources, strongest, strict=True)),
        }


class SourceActivitySums:
    """Running sums behind `SourceActivity`; an observer of a pass."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        device = crosscoder.mean.device
        size = (crosscoder.num_latents, len(crosscoder.reads))
        self._change, self._contribution = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
        self._value = torch.zeros(crosscoder.num_latents, dtype=torch.float64, device=device)
        self._count = torch.zeros(crosscoder.num_latents, dtype=torch.int64, device=device)
        self._reads = Columns(crosscoder.sources, crosscoder.reads.keys)

    @torch.no_grad()
    def update(self, batch: Batch, code: SparseCode) -> None:
        """Add the active pairs of one batch."""
        cc = self.crosscoder
        x = self._centred(batch.x.to(cc.mean))
        self._count += torch.bincount(code.latents, minlength=cc.num_latents)
        self._value.index_add_(0, code.latents, code.values.double())
        parts = code.split([group.num_latents for group in cc.wiring])
        for part, weights, layout in zip(parts, cc.weights, cc.layouts, strict=True):
            self._add_group(part, x, weights, layout)

    @property
    def result(self) -> SourceActivity:
        """The activities so far."""
        reads = _reads_mask(self.crosscoder).to(self._change.device)
        known = reads & (self._count > 0)[:, None]
        return SourceActivity(
            sources=self.crosscoder.reads.keys,
            activity=torch.where(known, self._change / self._value[:, None], torch.nan).cpu(),
            contribution=torch.where(known, self._contribution / self._count[:, None], torch.nan).cpu(),
            mean_value=(self._value / self._count).cpu(),
            num_active=self._count.cpu(),
        )

    def _add_group(
        self, code: SparseCode, x: Float[Tensor, "rows reads"], weights: GroupWeights, layout: GroupLayout
    ) -> None:
        cc, first = self.crosscoder, 0
        products = cc.backend.operations.pair_products
        latents = code.latents + layout.first
        for key in layout.group.reads:
            width = cc.reads[key].width
            encoder = weights.encoder[:, first : first + width].contiguous()
            moved = products(code.pattern, x[:, cc.reads.slices[key]].contiguous(), encoder).double()
            without = (code.values.double() - moved).clamp(min=0)
            place = cc.reads.index(key)
            self._contribution[:, place].index_add_(0, latents, moved)
            self._change[:, place].index_add_(0, latents, (code.values.double() - without).abs())
            first += width

    def _centred(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows reads"]:
        """What the stored encoder takes, with the mean taken off: with the normaliser folded in that is raw space."""
        cc, reads = self.crosscoder, self._reads(x)
        return reads - cc.mean_columns(cc.reads) if cc.folded_normaliser else cc.normalise_reads(reads)


def source_activity(
    crosscoder: Crosscoder, activations: ActivationSource, *, progress: Progress = silent
) -> SourceActivity:
    """The activity of every latent at every source that it reads, in one pass over `activations.contexts()`."""
    sums = SourceActivitySums(crosscoder)
    watch(crosscoder, activations, [sums], progress=progress)
    return sums.result


def _reads_mask(crosscoder: Crosscoder) -> Bool[Tensor, "latents sources"]:
    keys = crosscoder.reads.keys
    groups = [(torch.tensor([key in group.reads for key in keys]), group.num_latents) for group in crosscoder.wiring]
    return torch.cat([row.expand(number, -1) for row, number in groups])


def _column(values: Float[Tensor, "latents"]) -> pa.Array:
    return pa.array(values.float().numpy(), from_pandas=True)
