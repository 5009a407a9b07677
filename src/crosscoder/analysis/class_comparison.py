"""Exclusive against shared latents: are they denser, are they of more kinds, and could that be chance?

    ratio       s(exclusive) / s(shared), s the median (densities) or the mean (clusters, similarity)
    interval    95 % of the ratio under resampling of the latents within each class
    p           (1 + draws with |s(one) − s(two)| at least as large) / (1 + draws), classes dealt out anew at random

In Anthropic's study of February 2025 exclusive latents fire about ten times as densely as shared ones and are
polysemantic: a sign that capacity forced them together, not that the models differ. A ratio near 1 speaks against that.
Latents are resampled as if they were independent; both classes come from one training, whose seed is not resampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoder.analysis.classes import CLASSES, LatentClasses
from crosscoder.analysis.polysemanticity import Polysemanticity

Statistic = Literal["median", "mean"]
NUM_DRAWS = 2000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class ClassComparison:
    """One quantity of two sets of latents; NaN where one of the sets is empty."""

    quantity: str
    statistic: Statistic
    num_exclusive: int
    num_shared: int
    exclusive: float
    shared: float
    ratio: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class ExclusiveAgainstShared:
    """Density, clusters and similarity of exemplars of the exclusive latents of a and b against the shared ones.

    The last two are None where exemplars were not given.
    """

    a: str
    b: str
    density: ClassComparison
    clusters: ClassComparison | None
    similarity: ClassComparison | None

    @property
    def comparisons(self) -> list[ClassComparison]:
        """Those that there are."""
        return [found for found in (self.density, self.clusters, self.similarity) if found is not None]

    def table(self) -> pa.Table:
        """One row per quantity."""
        rows = [{k: None if v != v else v for k, v in asdict(found).items()} for found in self.comparisons]
        return pa.Table.from_pylist(rows)

    def to_json(self) -> dict[str, Any]:
        """The same by quantity; NaN for what an empty class leaves open."""
        numbers = {found.quantity: asdict(found) for found in self.comparisons}
        return {"a": self.a, "b": self.b, "interval": list(INTERVAL), "num_draws": NUM_DRAWS, **numbers}


def exclusive_against_shared(
    classes: LatentClasses,
    *,
    density: Float[Tensor, "latents"],
    polysemanticity: Polysemanticity | None = None,
    seed: int = 0,
) -> ExclusiveAgainstShared:
    """Compare live a-only and b-only latents with live shared ones, those that the wiring made so among them."""
    ids = classes.class_ids.cpu()
    live = density.cpu() > 0
    exclusive = live & ((ids == CLASSES.index("a-only")) | (ids == CLASSES.index("b-only")))
    shared = live & (ids == CLASSES.index("shared"))
    found = compare(density, exclusive, shared, quantity="density", statistic="median", seed=seed)
    if polysemanticity is None:
        return ExclusiveAgainstShared(classes.a, classes.b, found, None, None)
    one, two = (part[polysemanticity.latents] for part in (exclusive, shared))
    parts = {"clusters": polysemanticity.effective_clusters, "similarity": polysemanticity.similarity}
    rest = {
        name: compare(values, one, two, quantity=name, statistic="mean", seed=seed) for name, values in parts.items()
    }
    return ExclusiveAgainstShared(classes.a, classes.b, found, **rest)


def compare(
    values: Float[Tensor, "latents"],
    exclusive: Bool[Tensor, "latents"],
    shared: Bool[Tensor, "latents"],
    *,
    quantity: str,
    statistic: Statistic = "mean",
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> ClassComparison:
    """One quantity of two disjoint sets of latents; values that are NaN are left out."""
    assert not bool((exclusive & shared).any()), "a latent is in one class"
    one, two = (_finite(values, part) for part in (exclusive, shared))
    s = np.median if statistic == "median" else np.mean
    if not len(one) or not len(two):
        nothing = float("nan")
        return ClassComparison(
            quantity, statistic, len(one), len(two), _of(s, one), _of(s, two), nothing, nothing, nothing, nothing
        )
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = [s(rng.choice(one, len(one))) / s(rng.choice(two, len(two))) for _ in range(num_draws)]
    low, high = np.quantile(drawn, INTERVAL)
    gap = abs(s(one) - s(two)) * (1 - 1e-12)
    larger = sum(abs(s(a) - s(b)) >= gap for a, b in _dealt(np.concatenate([one, two]), len(one), num_draws, rng))
    return ClassComparison(
        quantity=quantity,
        statistic=statistic,
        num_exclusive=len(one),
        num_shared=len(two),
        exclusive=_of(s, one),
        shared=_of(s, two),
        ratio=float(s(one) / s(two)),
        low=float(low),
        high=float(high),
        p_value=(1 + larger) / (1 + num_draws),
    )


def _dealt(
    pooled: np.ndarray, size: int, num_draws: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pooled values dealt out at random to two sets of the original sizes."""
    for _ in range(num_draws):
        order = rng.permutation(pooled)
        yield order[:size], order[size:]


def _finite(values: Float[Tensor, "latents"], chosen: Bool[Tensor, "latents"]) -> Float[np.ndarray, "some"]:
    found = values.detach().double().cpu()[chosen.cpu()]
    return found[torch.isfinite(found)].numpy()


def _of(statistic: Any, values: np.ndarray) -> float:
    return float(statistic(values)) if len(values) else float("nan")
