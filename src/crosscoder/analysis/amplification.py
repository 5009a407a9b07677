"""Amplified and attenuated latents: fine-tuning mostly turns up or down what both models have.

Of a latent that both models share, with `v^m = d_i^m` its decoder row at model m and `β^m` from latent scaling *along
that row*, the least-squares answer to "how much of `f_i v^m` is in m's activations",

    norm ratio         log2 ‖v^b‖ / ‖v^a‖               what the dictionary says
    carried_m          β^m ‖v^m‖                        length along `v^m` that m's activations have per unit of f_i
    activation ratio   log2 carried_b / carried_a       what the activations say

0 is unchanged, 1 is twice as strong in b, −1 half. The two differ where shrinkage or another latent made a norm small.
Each β is of its own direction: `β^a` of the ordered pair that fixes `v^a`, `β^b` of the one that fixes `v^b`; both of
targets that are *activations*, so that what another latent of the same direction writes counts too, and so does
whatever fires together with this latent. No ratio (NaN, null) where a norm is zero, or a β is not above zero: then the
model does not carry the latent at all, which is no attenuation by a number.

Both ratios are of one stated space. In raw space they include the ratio of the sources' overall scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.crosscoder import Crosscoder, Space
from crosscoder.errors import SourceMismatch

MIN_ACTIVE = 50
"""Latents active on fewer rows are not ranked: their β is of a handful of rows."""


@dataclass(frozen=True)
class Carried:
    """One model's side: its source, decoder norms, and `β` of its activations along its own decoder rows."""

    source: str
    norm: Float[Tensor, "latents"]
    beta: Float[Tensor, "latents"]

    @classmethod
    def of(cls, crosscoder: Crosscoder, scaling: LatentScaling) -> Carried:
        """The side b of a scaling: of the ordered pair (a, b) it is b's, of (b, a) it is a's."""
        norms = crosscoder.decoder_norms(scaling.space).detach().double().cpu()
        return cls(scaling.b, norms[:, crosscoder.writes.index(scaling.b)], scaling.beta_activation_b)

    @property
    def length(self) -> Float[Tensor, "latents"]:
        """`β ‖v‖`, in activations' units per unit of f."""
        return self.beta * self.norm


@dataclass(frozen=True)
class Amplification:
    """log2 ratios of b over a for every latent; `ranked` are those that were asked about and are active enough."""

    a: Carried
    b: Carried
    space: Space
    norm_ratio: Float[Tensor, "latents"]
    activation_ratio: Float[Tensor, "latents"]
    num_active: Int[Tensor, "latents"]
    ranked: Bool[Tensor, "latents"]
    min_active: int
    density: Mapping[str, Float[Tensor, "latents"]]

    def most(
        self,
        way: Literal["amplified", "attenuated"],
        *,
        by: Literal["activation", "norm"] = "activation",
        num: int = 20,
    ) -> Int[Tensor, "some"]:
        """Ranked latents with a ratio above 0 (amplified in b) or below it (attenuated), most extreme first."""
        ratio = self.activation_ratio if by == "activation" else self.norm_ratio
        signed = ratio if way == "amplified" else -ratio
        usable = self.ranked & (signed > 0)
        order = torch.where(usable, signed, -torch.inf).argsort(descending=True, stable=True)
        return order[: min(num, int(usable.sum()))]

    def table(self) -> pa.Table:
        """One row per latent; the density of a role as `density_<role>`."""
        values = {
            "norm_ratio": self.norm_ratio,
            "activation_ratio": self.activation_ratio,
            "carried_a": self.a.length,
            "carried_b": self.b.length,
            **{f"density_{role}": density for role, density in self.density.items()},
        }
        return pa.table(
            {
                "latent": pa.array(range(len(self.norm_ratio)), pa.int32()),
                "num_active": pa.array(self.num_active.cpu().numpy()),
                "ranked": pa.array(self.ranked.cpu().numpy()),
                **{name: pa.array(v.float().cpu().numpy(), from_pandas=True) for name, v in values.items()},
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Quartiles of the ranked latents' ratios, how many doubled or halved, and the ten most extreme."""
        return {
            "a": self.a.source,
            "b": self.b.source,
            "space": self.space,
            "min_active": self.min_active,
            "num_ranked": int(self.ranked.sum()),
            "log2_activation_ratio": self._spread(self.activation_ratio),
            "log2_norm_ratio": self._spread(self.norm_ratio),
            "most_amplified": self.most("amplified", num=10).tolist(),
            "most_attenuated": self.most("attenuated", num=10).tolist(),
        }

    def _spread(self, ratio: Float[Tensor, "latents"]) -> dict[str, float | int | None]:
        found = ratio[self.ranked & ratio.isfinite()].double()
        quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=found.device)
        cut = torch.quantile(found, quarters).tolist() if len(found) else [None] * 3
        return {
            **dict(zip(("lower_quartile", "median", "upper_quartile"), cut, strict=True)),
            "num_doubled": int((found >= 1).sum()),
            "num_halved": int((found <= -1).sum()),
            "num_without": int((self.ranked & ~ratio.isfinite()).sum()),
        }


def amplification(
    a: Carried,
    b: Carried,
    *,
    num_active: Int[Tensor, "latents"],
    among: Bool[Tensor, "latents"] | None = None,
    density: Mapping[str, Float[Tensor, "latents"]] | None = None,
    space: Space = "normalised",
    min_active: int = MIN_ACTIVE,
) -> Amplification:
    """How much stronger every latent is in b than in a.

    `a.beta` is latent scaling's activation β of model a along a's decoder rows, and `b.beta` of b along b's: one is of
    the ordered pair (b, a), the other of (a, b), which `Carried.of` takes them from. `among` are the latents to rank,
    such as the shared ones; `density` is by role. All of `space`.
    """
    sizes = {len(part) for part in (a.norm, a.beta, b.norm, b.beta, num_active)}
    if len(sizes) > 1:
        raise SourceMismatch(
            "amplification compares one crosscoder's latents; the parts have different numbers of them.",
            details=[str(sorted(sizes))],
        )
    ranked = num_active >= min_active
    return Amplification(
        a=a,
        b=b,
        space=space,
        norm_ratio=_log2_ratio(b.norm, a.norm),
        activation_ratio=_log2_ratio(b.length, a.length),
        num_active=num_active,
        ranked=ranked if among is None else ranked & among,
        min_active=min_active,
        density=density or {},
    )


def _log2_ratio(above: Float[Tensor, "latents"], below: Float[Tensor, "latents"]) -> Float[Tensor, "latents"]:
    """NaN unless both are above zero."""
    both = (above > 0) & (below > 0)
    return torch.where(both, (above / below).log2(), torch.nan)
