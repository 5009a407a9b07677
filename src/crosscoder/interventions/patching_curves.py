"""Results of KL patching: mean divergences with intervals, shares of the gap that are recovered, and comparisons.

    KL(condition)        mean over tokens of KL(p_b ‖ p_condition), in nats
    recovered            1 − KL(condition) / KL(none)

Tokens of one document go together: intervals are the 2.5 and 97.5 % quantiles over Poisson bootstrap draws of
documents, the same draws for every condition, so that differences between conditions are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.errors import EditError
from crosscoder.training.json_numbers import json_values

Kind = Literal["reference", "tokens", "ranked", "random", "top half", "bottom half"]
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Condition:
    """What was put into the model: of a ranking its first `num_latents`, or one of its halves, or a reference.

    `seed` numbers random rankings.
    """

    kind: Kind
    name: str
    num_latents: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PatchingCurves:
    """Divergences of model b from itself when its activations at one site come from a, with latents put back.

    `kl[c, g]` is the mean over the tokens of group g under condition c; `draws` are its bootstrap draws.
    """

    a: str
    b: str
    conditions: tuple[Condition, ...]
    groups: tuple[str, ...]
    kl: Float[Tensor, "conditions groups"]
    draws: Float[Tensor, "draws conditions groups"]
    num_tokens: Int[Tensor, "groups"]
    num_documents: int
    num_contexts: int

    @cached_property
    def recovered(self) -> Float[Tensor, "conditions groups"]:
        """The share of the gap that each condition closes; NaN where there is no gap."""
        return _recovered(self.kl, self.kl[self._none])

    @cached_property
    def _recovered_draws(self) -> Float[Tensor, "draws conditions groups"]:
        return _recovered(self.draws, self.draws[:, self._none, None])

    @property
    def _none(self) -> int:
        return self.conditions.index(Condition("reference", "none"))

    def divergence(self, condition: Condition, *, group: str = "all") -> Estimate:
        """KL under one condition, in nats."""
        c, g = self._place(condition), self._group(group)
        return _estimate(self.kl[c, g], self.draws[:, c, g])

    def share_recovered(self, condition: Condition, *, group: str = "all") -> Estimate:
        """The share of the gap that one condition closes."""
        c, g = self._place(condition), self._group(group)
        return _estimate(self.recovered[c, g], self._recovered_draws[:, c, g])

    def compare(self, one: Condition, other: Condition, *, group: str = "all") -> Estimate:
        """The share that `one` recovers minus the share that `other` does; the interval is of the pair."""
        c, d, g = self._place(one), self._place(other), self._group(group)
        draws = self._recovered_draws
        return _estimate(self.recovered[c, g] - self.recovered[d, g], draws[:, c, g] - draws[:, d, g])

    def halves(self, ranking: str, *, group: str = "all") -> Estimate:
        """Recovered by the top half of a ranking's chosen set minus by its bottom half: does the ranking say more?"""
        top, bottom = (self._only(kind, ranking) for kind in ("top half", "bottom half"))
        return self.compare(top, bottom, group=group)

    def curve(self, name: str, *, group: str = "all") -> list[tuple[int, Estimate]]:
        """The share recovered by the number of latents, for a ranking; for "random" the mean over seeds."""
        places: dict[int, list[int]] = {}
        for place, condition in enumerate(self.conditions):
            if condition.kind in ("ranked", "random") and condition.name == name and condition.num_latents is not None:
                places.setdefault(condition.num_latents, []).append(place)
        if not places:
            raise EditError(f"no curve is called {name!r}.", details=self.names, hint="Name one of these.")
        g, draws = self._group(group), self._recovered_draws
        return [
            (size, _estimate(self.recovered[at, g].mean(), draws[:, at, g].mean(1)))
            for size, at in sorted(places.items())
        ]

    @property
    def names(self) -> list[str]:
        """The rankings that have a curve, "random" among them where there are random sets."""
        return list(dict.fromkeys(c.name for c in self.conditions if c.kind in ("ranked", "random")))

    def table(self) -> pa.Table:
        """One row per condition and group."""
        low, high = (_quantile(self.draws, q) for q in INTERVAL)
        share_low, share_high = (_quantile(self._recovered_draws, q) for q in INTERVAL)
        num_conditions = len(self.conditions)
        described = [c for c in self.conditions for _ in self.groups]
        columns = {
            "kl": self.kl,
            "kl_low": low,
            "kl_high": high,
            "recovered": self.recovered,
            "recovered_low": share_low,
            "recovered_high": share_high,
        }
        return pa.table(
            {
                "kind": [c.kind for c in described],
                "name": [c.name for c in described],
                "num_latents": pa.array([c.num_latents for c in described], pa.int32()),
                "seed": pa.array([c.seed for c in described], pa.int32()),
                "group": list(self.groups) * num_conditions,
                "num_tokens": pa.array(self.num_tokens.tolist() * num_conditions, pa.int64()),
                **{name: pa.array(_or_none(values), pa.float64()) for name, values in columns.items()},
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the draws."""
        return json_values(
            {
                "format": "crosscoder.patching/1",
                "a": self.a,
                "b": self.b,
                "num_contexts": self.num_contexts,
                "num_documents": self.num_documents,
                "num_tokens": dict(zip(self.groups, self.num_tokens.tolist(), strict=True)),
                "interval": list(INTERVAL),
                "conditions": self.table().drop_columns(["num_tokens"]).to_pylist(),
            }
        )

    def _only(self, kind: Kind, name: str) -> Condition:
        found = [c for c in self.conditions if (c.kind, c.name) == (kind, name)]
        if not found:
            raise EditError(f"no chosen set of {name!r} was halved.", details=self.names, hint="Name one of these.")
        return found[0]

    def _place(self, condition: Condition) -> int:
        if condition in self.conditions:
            return self.conditions.index(condition)
        raise EditError(
            f"expected a condition that was run; got {condition}.",
            details=[f"{c.kind} {c.name} {c.num_latents or ''}".strip() for c in self.conditions],
        )

    def _group(self, group: str) -> int:
        if group in self.groups:
            return self.groups.index(group)
        raise EditError(f"the text has no tokens of a group {group!r}.", details=self.groups, hint="Name one of these.")


def bootstrap_means(
    sums: Float[Tensor, "conditions groups documents"],
    counts: Float[Tensor, "groups documents"],
    *,
    num_draws: int,
    seed: int,
) -> Float[Tensor, "draws conditions groups"]:
    """Means over resampled documents, each taken Poisson(1) times; NaN where a draw has none of a group's."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.poisson(torch.ones(num_draws, sums.shape[2], dtype=sums.dtype), generator=generator)
    numerator = torch.einsum("dk,cgk->dcg", weights, sums)
    return numerator / torch.einsum("dk,gk->dg", weights, counts)[:, None]


def _recovered(kl: Tensor, gap: Tensor) -> Tensor:
    return torch.where(gap > 0, 1 - kl / gap, torch.nan)


def _estimate(value: Tensor, draws: Tensor) -> Estimate:
    low, high = (float(_quantile(draws, q)) for q in INTERVAL)
    return Estimate(float(value), low, high)


def _quantile(draws: Tensor, q: float) -> Tensor:
    return torch.nanquantile(draws, q, dim=0)


def _or_none(values: Tensor) -> Sequence[float | None]:
    return [value if math.isfinite(value) else None for value in values.flatten().tolist()]
