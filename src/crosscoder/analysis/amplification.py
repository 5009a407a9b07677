"""Amplified and attenuated latents: fine-tuning mostly turns up or down what both models have.

Of a latent that both models share, with `v^m = d_i^m` its decoder row at model m and β from latent scaling *along that
row*, the least-squares answer to "how much of `f_i v^m` is in this target at m",

    norm ratio         log2 ‖v^b‖ / ‖v^a‖                          what the dictionary says
    own ratio          log2 β_error^b ‖v^b‖ / β_error^a ‖v^a‖      what the other latents leave for this one
    activation ratio   log2 β_act^b ‖v^b‖ / β_act^a ‖v^a‖          what the activations carry while the latent is active

0 is unchanged, 1 is twice as strong in b, −1 half. The first is subject to shrinkage. The second puts that right: its
target is the error with the latent's own part put back. The third takes the activations whole, so that whatever fires
together with the latent counts, in either model: it says how strongly the direction is there, whoever writes it. A
latent is itself amplified where the first two agree; where only the third is large, its company is.

Each β is of its own direction: `β^a` of the ordered pair that fixes `v^a`, `β^b` of the one that fixes `v^b`. No ratio
(NaN, null) where a norm is zero, or a β is not above zero: then the model does not carry the latent at all, which is
no attenuation by a number. All ratios are of one stated space; in raw space they include the ratio of the sources'
overall scales.
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
    """One model's side: its source, decoder norms, and β of its activations along its own decoder rows.

    `beta_error`, of its errors with the latent's own part put back, may be left out: then there are no own ratios.
    """

    source: str
    norm: Float[Tensor, "latents"]
    beta: Float[Tensor, "latents"]
    beta_error: Float[Tensor, "latents"] | None = None

    @classmethod
    def of(cls, crosscoder: Crosscoder, scaling: LatentScaling) -> Carried:
        """The side b of a scaling: of the ordered pair (a, b) it is b's, of (b, a) it is a's."""
        norms = crosscoder.decoder_norms(scaling.space).detach().double().cpu()
        norm = norms[:, crosscoder.writes.index(scaling.b)]
        return cls(scaling.b, norm, scaling.beta_activation_b, scaling.beta_error_b)

    @property
    def length(self) -> Float[Tensor, "latents"]:
        """`β_act ‖v‖`: what the activations carry along v, per unit of f."""
        return self.beta * self.norm

    @property
    def own_length(self) -> Float[Tensor, "latents"]:
        """`β_error ‖v‖`: what of it the other latents leave for this one; NaN where that was not given."""
        return torch.full_like(self.norm, torch.nan) if self.beta_error is None else self.beta_error * self.norm


@dataclass(frozen=True)
class Amplification:
    """log2 ratios of b over a for every latent; `ranked` are those that were asked about and are active enough."""

    a: Carried
    b: Carried
    space: Space
    norm_ratio: Float[Tensor, "latents"]
    own_ratio: Float[Tensor, "latents"]
    activation_ratio: Float[Tensor, "latents"]
    num_active: Int[Tensor, "latents"]
    ranked: Bool[Tensor, "latents"]
    min_active: int
    density: Mapping[str, Float[Tensor, "latents"]]

    def most(
        self,
        way: Literal["amplified", "attenuated"],
        *,
        by: Literal["own", "activation", "norm"] = "own",
        num: int = 20,
    ) -> Int[Tensor, "some"]:
        """Ranked latents with a ratio above 0 (amplified in b) or below it (attenuated), most extreme first."""
        ratio = {"own": self.own_ratio, "activation": self.activation_ratio, "norm": self.norm_ratio}[by]
        signed = ratio if way == "amplified" else -ratio
        usable = self.ranked & (signed > 0)
        order = torch.where(usable, signed, -torch.inf).argsort(descending=True, stable=True)
        return order[: min(num, int(usable.sum()))]

    def table(self) -> pa.Table:
        """One row per latent; the density of a role as `density_<role>`."""
        values = {
            "norm_ratio": self.norm_ratio,
            "own_ratio": self.own_ratio,
            "activation_ratio": self.activation_ratio,
            "carried_a": self.a.length,
            "carried_b": self.b.length,
            "own_a": self.a.own_length,
            "own_b": self.b.own_length,
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
        """Quartiles of the ranked latents' ratios, how many doubled or halved, the most extreme by own ratios."""
        return {
            "a": self.a.source,
            "b": self.b.source,
            "space": self.space,
            "min_active": self.min_active,
            "num_ranked": int(self.ranked.sum()),
            "log2_own_ratio": self._spread(self.own_ratio),
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

    Each side's β are along its own decoder rows: a's of the ordered pair (b, a), b's of (a, b), from which `Carried.of`
    takes them. `among` are the latents to rank, such as the shared ones; `density` is by role. All of `space`.
    """
    parts = [part for side in (a, b) for part in (side.norm, side.beta, side.beta_error) if part is not None]
    sizes = {len(part) for part in (*parts, num_active)}
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
        own_ratio=_log2_ratio(b.own_length, a.own_length),
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
