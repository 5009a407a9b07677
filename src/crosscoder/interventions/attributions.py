"""What attribution gives: the effect of every active latent at every token on a metric, in the model of one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.errors import EditError
from crosscoder.training.json_numbers import json_values


@dataclass(frozen=True)
class Attribution:
    """Effects of active pairs (context, position, latent) at `source`, in the metric's unit.

    `metric` and `metric_start` are of the contexts `numbers`, as they are and at the path's start.
    """

    source: str
    context: Int[Tensor, "pairs"]
    position: Int[Tensor, "pairs"]
    latent: Int[Tensor, "pairs"]
    effect: Float[Tensor, "pairs"]
    numbers: Int[Tensor, "contexts"]
    metric: Float[Tensor, "contexts"]
    metric_start: Float[Tensor, "contexts"]

    @cached_property
    def latents(self) -> Int[Tensor, "latents"]:
        """Every latent that was active, the one of the largest effect first."""
        return self._by_latent[0]

    @cached_property
    def effects(self) -> Float[Tensor, "latents"]:
        """The indirect effect of each of `latents`: summed over tokens, mean over contexts."""
        return self._by_latent[1]

    @property
    def missing(self) -> Float[Tensor, "contexts"]:
        """What the effects fall short of the change of the metric along the path; 0 for enough steps."""
        place = torch.full((int(self.numbers.max()) + 1,), -1)
        place[self.numbers] = torch.arange(len(self.numbers))
        summed = torch.zeros_like(self.metric).index_add_(0, place[self.context], self.effect)
        return (self.metric - self.metric_start) - summed

    def top(self, count: int = 10) -> list[int]:
        """The latents of the largest effects, of either sign."""
        return self.latents[:count].tolist()

    def table(self) -> pa.Table:
        """One row per latent: its effect, and on how many tokens it was active."""
        return pa.table(
            {
                "latent": pa.array(self.latents.tolist(), pa.int32()),
                "effect": pa.array(self.effects.tolist(), pa.float64()),
                "num_active": pa.array(torch.bincount(self.latent)[self.latents].tolist(), pa.int32()),
            }
        )

    def token_table(self) -> pa.Table:
        """One row per active pair."""
        columns = {"context": self.context, "position": self.position, "latent": self.latent}
        return pa.table(
            {
                **{name: pa.array(column.tolist(), pa.int32()) for name, column in columns.items()},
                "effect": pa.array(self.effect.tolist(), pa.float64()),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The effects by latent, and how much of the metric's change they leave out."""
        return json_values(
            {
                "format": "crosscoder.attribution/1",
                "source": self.source,
                "metric": self.metric.mean().item(),
                "metric_start": self.metric_start.mean().item(),
                "missing": self.missing.mean().item(),
                "num_contexts": len(self.numbers),
                "latents": self.latents.tolist(),
                "effects": self.effects.tolist(),
            }
        )

    @classmethod
    def joined(cls, parts: Sequence[Attribution], *, num_contexts: int) -> Attribution:
        """Those of several blocks as one, with contexts in their order."""
        pairs = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("context", "position", "latent")}
        order = torch.cat([part.numbers for part in parts]).argsort()
        assert len(order) == num_contexts, "every context is in one block"
        return cls(
            source=parts[0].source,
            **pairs,
            effect=torch.cat([part.effect for part in parts]),
            numbers=torch.arange(num_contexts),
            metric=torch.cat([part.metric for part in parts])[order],
            metric_start=torch.cat([part.metric_start for part in parts])[order],
        )

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        latents, place = self.latent.unique(return_inverse=True)
        effects = torch.zeros(len(latents), dtype=self.effect.dtype).index_add_(0, place, self.effect)
        order = effects.abs().argsort(descending=True, stable=True)
        return latents[order], effects[order] / len(self.numbers)


@dataclass(frozen=True)
class RelativeIndirectEffect:
    """For each latent the effect in each source's model, and its share: `|IE_s| / Σ_s' |IE_s'|`; NaN where all are 0.

    With two sources the second share is the relative indirect effect: 0 the first model alone, 1 the second alone.
    """

    sources: tuple[str, ...]
    latents: Int[Tensor, "latents"]
    effects: Float[Tensor, "latents sources"]
    share: Float[Tensor, "latents sources"]

    def table(self) -> pa.Table:
        """One row per latent, one pair of columns per source."""
        columns = {f"{kind}/{key}": values[:, i] for i, key in enumerate(self.sources) for kind, values in self._kinds}
        arrays = {name: pa.array([None if v != v else v for v in c.tolist()]) for name, c in columns.items()}
        return pa.table({"latent": pa.array(self.latents.tolist(), pa.int32()), **arrays})

    @property
    def _kinds(self) -> tuple[tuple[str, Tensor], ...]:
        return ("effect", self.effects), ("share", self.share)


def relative_indirect_effect(attributions: Sequence[Attribution]) -> RelativeIndirectEffect:
    """Compares the effects of the same latents on the same metric in several models, one attribution for each."""
    sources = tuple(attribution.source for attribution in attributions)
    lengths = {len(attribution.numbers) for attribution in attributions}
    if len(set(sources)) < 2 or len(set(sources)) < len(sources) or len(lengths) > 1:
        raise EditError(
            "expected attributions of one set of contexts at two or more different sources.",
            details=[f"{each.source}: {len(each.numbers)} contexts" for each in attributions],
            hint="Attribute the same metric on the same contexts once for every source.",
        )
    latents = torch.cat([attribution.latents for attribution in attributions]).unique()
    effects = torch.zeros(len(latents), len(sources), dtype=torch.float64)
    for column, attribution in enumerate(attributions):
        effects[torch.searchsorted(latents, attribution.latents), column] = attribution.effects
    size = effects.abs()
    total = size.sum(1, keepdim=True)
    return RelativeIndirectEffect(sources, latents, effects, torch.where(total > 0, size / total, torch.nan))
