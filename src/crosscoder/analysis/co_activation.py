"""Co-activation: of pairs of latents, how often they are active together, and how strongly.

Over N units (rows, or contexts with each latent's largest value there), for a pair (i, j) active on `n_i` and `n_j` of
them and on `n_ij` together:

    Jaccard       n_ij / (n_i + n_j − n_ij)                    overlap      n_ij / min(n_i, n_j)
    lift          N n_ij / (n_i n_j)          1 is chance      correlation  of f_i and f_j over all N units
    divergence    (only_i + only_j) / (high_i + high_j − high_ij)

`high`: above 0.4 of the latent's largest value; `only_i`: i is high and j at most 0.1 of its own. 1: where one is
strong the other is not; 0: where one is strong the other is too, or at least not weak. Buckets and divergence are those
of the code of Minder et al. 2025 (edges 1e-6, 0.1, 0.4, 0.7). It needs the largest values before the pass.

One pass over the active pairs; what is kept is a few numbers per pair and per latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import Batch
from crosscoder.codes import SparseCode
from crosscoder.errors import ConfigError, SourceMismatch

LOW, HIGH = 0.1, 0.4
"""Of a latent's largest value: up to LOW it counts as not firing, above HIGH as firing strongly."""
_AT_ONCE = 2**21

Unit = Literal["row", "context"]


@dataclass(frozen=True)
class CoActivation:
    """Counts of pairs of latents over `num_units` rows or contexts, and what follows from them; NaN without a unit."""

    latents_a: Int[Tensor, "pairs"]
    latents_b: Int[Tensor, "pairs"]
    unit: Unit
    num_units: int
    num_a: Int[Tensor, "pairs"]
    num_b: Int[Tensor, "pairs"]
    num_both: Int[Tensor, "pairs"]
    correlation: Float[Tensor, "pairs"]
    num_high: Int[Tensor, "pairs"]
    """Units on which one of the two is high, or both."""
    num_only: Int[Tensor, "pairs"]
    """Units on which one is high and the other low."""

    @property
    def jaccard(self) -> Float[Tensor, "pairs"]:
        """Units with both, of those with any."""
        return self.num_both / (self.num_a + self.num_b - self.num_both)

    @property
    def overlap(self) -> Float[Tensor, "pairs"]:
        """Units with both, of those with the rarer one."""
        return self.num_both / torch.minimum(self.num_a, self.num_b)

    @property
    def lift(self) -> Float[Tensor, "pairs"]:
        """How many times as often together as independent latents would be."""
        return self.num_both * self.num_units / (self.num_a.double() * self.num_b)

    @property
    def divergence(self) -> Float[Tensor, "pairs"]:
        """Units on which one is high and the other low, of those on which any is high."""
        return self.num_only / self.num_high

    def take(self, index: Int[Tensor, "some"]) -> CoActivation:
        """Some of the pairs, in that order."""
        per_pair = (self.num_a, self.num_b, self.num_both, self.correlation, self.num_high, self.num_only)
        some = [part[index] for part in per_pair]
        return CoActivation(self.latents_a[index], self.latents_b[index], self.unit, self.num_units, *some)

    def table(self) -> pa.Table:
        """One row per pair."""
        shares = {name: getattr(self, name) for name in ("jaccard", "overlap", "lift", "correlation", "divergence")}
        return pa.table(
            {
                "latent_a": pa.array(self.latents_a.tolist(), pa.int32()),
                "latent_b": pa.array(self.latents_b.tolist(), pa.int32()),
                "num_a": pa.array(self.num_a.tolist(), pa.int64()),
                "num_b": pa.array(self.num_b.tolist(), pa.int64()),
                "num_both": pa.array(self.num_both.tolist(), pa.int64()),
                **{name: pa.array(values.float().numpy(), from_pandas=True) for name, values in shares.items()},
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Medians over the pairs that have the number."""
        numbers = {name: getattr(self, name) for name in ("jaccard", "overlap", "correlation", "divergence")}
        return {
            "unit": self.unit,
            "num_units": self.num_units,
            "num_pairs": len(self.latents_a),
            **{f"median_{name}": _median(values) for name, values in numbers.items()},
        }


class CoActivationSums:
    """Running counts of given pairs; an observer of a pass. `max_values` are the latents' largest values."""

    def __init__(
        self,
        latents_a: Int[Tensor, "pairs"],
        latents_b: Int[Tensor, "_"],
        *,
        max_values: Float[Tensor, "latents"],
        unit: Unit = "row",
    ) -> None:
        self.unit: Unit = unit
        self.num_latents, self.num_units = len(max_values), 0
        _check(latents_a, latents_b, self.num_latents)
        order = latents_a.cpu().argsort(stable=True)
        self._order = order
        self._a, self._b = latents_a.cpu()[order], latents_b.cpu()[order]
        self._starts = torch.searchsorted(self._a, torch.arange(self.num_latents + 1))
        self._max = max_values.double().cpu()
        self._count, self._high = (torch.zeros(self.num_latents, dtype=torch.int64) for _ in range(2))
        self._sum, self._square = (torch.zeros(self.num_latents, dtype=torch.float64) for _ in range(2))
        self._joint = torch.zeros(4, len(order), dtype=torch.int64)  # both; both high; a high, b not low; b high, a not
        self._product = torch.zeros(len(order), dtype=torch.float64)

    @torch.no_grad()
    def update(self, batch: Batch, code: SparseCode) -> None:
        """Add the units of one batch of whole contexts."""
        code = in_units(batch, code, self.unit)
        latents, values = code.latents.cpu(), code.values.double().cpu()
        share = values / self._max[latents].clamp(min=torch.finfo(torch.float64).tiny)
        self.num_units += code.num_rows
        self._count += torch.bincount(latents, minlength=self.num_latents)
        self._high += torch.bincount(latents[share > HIGH], minlength=self.num_latents)
        self._sum.index_add_(0, latents, values)
        self._square.index_add_(0, latents, values.square())
        keys = code.row_ids.cpu() * self.num_latents + latents  # sorted: rows ascend, latents within them
        for first, second, pair in self._joined(keys, latents):
            self._product.index_add_(0, pair, values[first] * values[second])
            a, b = share[first], share[second]
            every = torch.ones_like(a, dtype=torch.bool)
            for n, there in enumerate((every, (a > HIGH) & (b > HIGH), (a > HIGH) & (b > LOW), (b > HIGH) & (a > LOW))):
                self._joint[n] += torch.bincount(pair[there], minlength=len(self._order))

    @property
    def result(self) -> CoActivation:
        """The counts so far, pairs in the order in which they were given."""
        both, both_high, a_high_b_there, b_high_a_there = self._joint
        high_a, high_b = self._high[self._a], self._high[self._b]
        in_order = CoActivation(
            latents_a=self._a,
            latents_b=self._b,
            unit=self.unit,
            num_units=self.num_units,
            num_a=self._count[self._a],
            num_b=self._count[self._b],
            num_both=both,
            correlation=self._correlation(),
            num_high=high_a + high_b - both_high,
            num_only=high_a - a_high_b_there + high_b - b_high_a_there,
        )
        return in_order.take(self._order.argsort())

    def _joined(self, keys: Tensor, latents: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For pairs active in one unit: the entry of a's latent, that of b's, and the pair; some at a time."""
        partners = self._starts.diff()[latents]
        with_partners = partners.nonzero().squeeze(1)
        ends = partners[with_partners].cumsum(0)
        for some in with_partners.tensor_split(_chunk_edges(ends)):
            number = partners[some]
            first = some.repeat_interleave(number)
            offset = torch.arange(len(first)) - (number.cumsum(0) - number).repeat_interleave(number)
            pair = self._starts[latents[first]] + offset
            wanted = keys[first] - latents[first] + self._b[pair]
            slot = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
            hit = (keys[slot] == wanted).nonzero().squeeze(1)
            yield first[hit], slot[hit], pair[hit]

    def _correlation(self) -> Float[Tensor, "pairs"]:
        mean = self._sum / max(1, self.num_units)
        spread = (self._square / max(1, self.num_units) - mean.square()).clamp(min=0).sqrt()
        covariance = self._product / max(1, self.num_units) - mean[self._a] * mean[self._b]
        scale = spread[self._a] * spread[self._b]
        return torch.where(scale > 0, covariance / scale, torch.nan)


def in_units(batch: Batch, code: SparseCode, unit: Unit) -> SparseCode:
    """The code by row as it is; by context, with one row per context of the batch and each latent's largest value."""
    if unit == "row":
        return code
    if batch.rows is None:
        raise SourceMismatch(
            "counting by context needs to know where each row lies; these activations do not say.",
            hint='Read them from a stream over text, or count with unit="row".',
        )
    contexts, place = batch.rows.context.to(code.latents.device).unique(return_inverse=True)
    cells, entry = (place[code.row_ids] * code.num_latents + code.latents).unique(return_inverse=True)
    largest = code.values.new_zeros(len(cells)).scatter_reduce_(0, entry, code.values, "amax")
    size = (len(contexts), code.num_latents)
    return SparseCode.from_pairs(cells // code.num_latents, cells % code.num_latents, largest, size=size)


def _chunk_edges(ends: Int[Tensor, "entries"]) -> Tensor:
    """Where to cut entries so that each part has about `_AT_ONCE` partners."""
    total = int(ends[-1]) if len(ends) else 0
    return torch.searchsorted(ends, torch.arange(_AT_ONCE, max(_AT_ONCE, total), _AT_ONCE))


def _check(latents_a: Tensor, latents_b: Tensor, num_latents: int) -> None:
    if len(latents_a) != len(latents_b):
        raise ConfigError(f"expected as many latents of a as of b; got {len(latents_a)} and {len(latents_b)}.")
    both = torch.cat([latents_a, latents_b])
    outside = both[(both < 0) | (both >= num_latents)]
    if len(outside):
        raise ConfigError(f"expected latents from 0 to {num_latents - 1}; got {int(outside[0])}.")


def _median(values: Float[Tensor, "pairs"]) -> float | None:
    found = values[values.isfinite()]
    return float(found.median()) if len(found) else None
