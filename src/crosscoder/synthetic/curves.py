"""Recall by frequency, densities by class: how well rare concepts are found, and whether exclusive latents are dense.

Intervals of a recall are Wilson's: `(p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n)`, z = 1.96 (Wilson 1927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoder.synthetic.recovery import ExclusiveRecovery
from crosscoder.synthetic.truth import Truth

Z = 1.959964


@dataclass(frozen=True)
class PowerCurve:
    """Recall of concepts in bins of frequency, from `edges[n]` to `edges[n + 1]`, with 95 % intervals.

    NaN where a bin has no concepts.
    """

    edges: tuple[float, ...]
    num_concepts: tuple[int, ...]
    recall: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def table(self) -> pa.Table:
        """One row per bin."""
        return pa.table(
            {
                "frequency_from": pa.array(self.edges[:-1], pa.float32()),
                "frequency_to": pa.array(self.edges[1:], pa.float32()),
                "num_concepts": pa.array(self.num_concepts, pa.int32()),
                "recall": pa.array(self.recall, pa.float32()),
                "low": pa.array(self.low, pa.float32()),
                "high": pa.array(self.high, pa.float32()),
            }
        )


def recall_by_frequency(
    recovered: Bool[Tensor, "concepts"], frequencies: Float[Tensor, "concepts"], *, edges: Sequence[float]
) -> PowerCurve:
    """The fraction recovered in each bin of frequency, lower edge included; concepts of several runs may be joined."""
    inside = [(frequencies >= low) & (frequencies < high) for low, high in pairwise(edges)]
    counts = [(int((recovered & here).sum()), int(here.sum())) for here in inside]
    bounds = [wilson(found, number) for found, number in counts]
    return PowerCurve(
        edges=tuple(edges),
        num_concepts=tuple(number for _, number in counts),
        recall=tuple(found / number if number else float("nan") for found, number in counts),
        low=tuple(low for low, _ in bounds),
        high=tuple(high for _, high in bounds),
    )


def wilson(found: int, number: int) -> tuple[float, float]:
    """95 % interval of a fraction; NaN of nothing."""
    if not number:
        return float("nan"), float("nan")
    p, z2 = found / number, Z * Z
    middle, half = p + z2 / (2 * number), Z * sqrt(p * (1 - p) / number + z2 / (4 * number**2))
    return max(0.0, (middle - half) / (1 + z2 / number)), min(1.0, (middle + half) / (1 + z2 / number))


@dataclass(frozen=True)
class Densities:
    """Firing densities of live latents by class, beside the frequencies of the concepts of that class."""

    exclusive: Float[Tensor, "called"]
    shared: Float[Tensor, "others"]
    true_exclusive: Float[Tensor, "exclusive_concepts"]
    true_shared: Float[Tensor, "shared_concepts"]

    @property
    def ratio(self) -> float:
        """Median density of exclusive latents over that of shared ones; NaN where a class is empty."""
        return _median_ratio(self.exclusive, self.shared)

    @property
    def true_ratio(self) -> float:
        """The same ratio of the concepts' frequencies: what an unbiased dictionary would show."""
        return _median_ratio(self.true_exclusive, self.true_shared)

    def table(self) -> pa.Table:
        """One row per class: number, quartiles."""
        parts = {
            "exclusive latents": self.exclusive,
            "shared latents": self.shared,
            "exclusive concepts": self.true_exclusive,
            "shared concepts": self.true_shared,
        }
        quartiles = [_quartiles(part) for part in parts.values()]
        columns = dict(zip(("lower_quartile", "median", "upper_quartile"), zip(*quartiles, strict=True), strict=True))
        return pa.table(
            {"class": list(parts), "number": [len(part) for part in parts.values()]}
            | {name: pa.array(values, pa.float32()) for name, values in columns.items()}
        )


def densities(recovery: ExclusiveRecovery, truth: Truth, *, density: Float[Tensor, "latents"]) -> Densities:
    """Densities of latents called exclusive and of the other live ones; shared concepts are those at both sources."""
    called, exclusive = recovery.called > 0, recovery.only_a | recovery.only_b
    at_both = truth.presence[:, [truth.sources.index(recovery.a), truth.sources.index(recovery.b)]].all(1)
    return Densities(
        exclusive=density[called],
        shared=density[recovery.live & ~called],
        true_exclusive=truth.frequencies[exclusive],
        true_shared=truth.frequencies[at_both],
    )


def _median_ratio(a: Tensor, b: Tensor) -> float:
    return float(a.median() / b.median()) if len(a) and len(b) else float("nan")


def _quartiles(values: Tensor) -> tuple[float, float, float]:
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    low, middle, high = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return low, middle, high
