"""Latent scaling: how much of a latent is in each of two sources, whatever its decoder norms say.

For the ordered pair (a, b) the direction of latent j is its decoder row at b, `v = d_j^b`, for targets at a and at b.
Of a target y at source m ∈ {a, b},

    β_j(y) = argmin_β Σ_t ‖β f_j(t) v − y(t)‖² = ⟨v, Σ_t f_j(t) y(t)⟩ / (S_j ‖v‖²)        S_j = Σ_t f_j(t)²

with `f ≥ 0` the raw code and the sums over all rows t. The targets, x = x̂ + e:

    activation          x^m                                 without bias: x^m − b_dec^m
    reconstruction      x̂^m (full), or x̂^m − f_j d_j^m      (leave_one_out)
    error               e^m + f_j d_j^m                     the error, with what j itself explains put back

and the ratios `ν = β(a) / β(b)`: near 0 the concept is b's alone, near 1 both sources have it. High ν_error means that
j was shrunk at a though the concept is there (complete shrinkage), high ν_reconstruction that other latents say it at a
(latent decoupling). Minder et al. 2025 (arXiv 2504.02922), section 3; they call a latent of b specific at ν_error < 0.2
and ν_reconstruction < 0.5. Their paper's code takes j out of the reconstruction, their later toolkit leaves it in.

Every β is linear in its target, so that five sums per latent hold all of it and one pass suffices (`ScalingSums`):

    R^m_j = Σ_t f_j ⟨v, x̂^m⟩     E^m_j = Σ_t f_j ⟨v, e^m⟩     S_j     F_j = Σ_t f_j     (m = a, b)
    β_reconstruction = R / (S ‖v‖²)  [− ⟨v, d_j^m⟩ / ‖v‖²]     β_error = E / (S ‖v‖²) + ⟨v, d_j^m⟩ / ‖v‖²
    β_activation = (R + E) / (S ‖v‖²)                          without bias: − F ⟨v, b_dec^m⟩ / (S ‖v‖²)

These are of normalised space, `x̃_m = (x_m − μ_m) c_m`. In raw space directions are `d_j^m / c_m` and the mean is part
of activation and reconstruction, so that

    β_raw = (c_b / c_m) β + c_b F ⟨v, μ_m⟩ / (S ‖v‖²)          the second term not for errors, nor without bias

and ν of errors is multiplied by `c_b / c_a`. NaN for latents that never fire, or that have no direction at b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import ActivationSource
from crosscoder.analysis.bootstrap import MIN_DOCUMENTS, Bootstrap
from crosscoder.analysis.passes import watch_reconstructions
from crosscoder.analysis.scaling_sums import Pair, PairSums, ScalingSums, Side
from crosscoder.capture.ancestry import Ancestry
from crosscoder.crosscoder import Crosscoder, Space

ReconstructionKind = Literal["full", "leave_one_out"]
TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")
LEAST_BETA = 0.5
"""Of `β_error` at the own side: below it a decoder row is left over from the start of training."""
INTERVALS = ("nu_error", "nu_reconstruction", "nu_activation")
"""The ratios that have intervals."""
NUMBERS = tuple([f"beta_{target}_{side}" for target in TARGETS for side in "ab"] + [f"nu_{t}" for t in TARGETS])
_BLOCK = 4096
"""Latents whose draws are turned into ratios at once."""


@dataclass(frozen=True)
class ScalingIntervals:
    """Ends of the intervals of ν, and the documents behind them; NaN for latents of fewer than `MIN_DOCUMENTS`.

    Percentiles of `num_draws` resamplings of the documents; `level` of the draws lie between them.
    """

    level: float
    num_draws: int
    num_documents: Int[Tensor, "latents"]
    nu_error: Float[Tensor, "latents 2"]
    nu_reconstruction: Float[Tensor, "latents 2"]
    nu_activation: Float[Tensor, "latents 2"]


@dataclass(frozen=True)
class LatentScaling:
    """β of every latent at the sources `a` and `b`, along its direction at b, and their ratios ν; in fp64 on the CPU.

    ν near 0: the concept is b's alone; near 1: both have it. `reason` says why scaling has no meaning for this pair;
    then all numbers but `num_active` are NaN and there are no intervals. `intervals` is None without bootstrap.
    """

    a: str
    b: str
    space: Space
    reconstruction: ReconstructionKind
    beta_activation_a: Float[Tensor, "latents"]
    beta_activation_b: Float[Tensor, "latents"]
    beta_activation_no_bias_a: Float[Tensor, "latents"]
    beta_activation_no_bias_b: Float[Tensor, "latents"]
    beta_reconstruction_a: Float[Tensor, "latents"]
    beta_reconstruction_b: Float[Tensor, "latents"]
    beta_error_a: Float[Tensor, "latents"]
    beta_error_b: Float[Tensor, "latents"]
    nu_activation: Float[Tensor, "latents"]
    nu_activation_no_bias: Float[Tensor, "latents"]
    nu_reconstruction: Float[Tensor, "latents"]
    nu_error: Float[Tensor, "latents"]
    num_active: Int[Tensor, "latents"]
    intervals: ScalingIntervals | None = None
    reason: str | None = None

    def specific(
        self, *, nu_error: float = 0.2, nu_reconstruction: float = 0.5, least_beta: float = LEAST_BETA
    ) -> Bool[Tensor, "latents"]:
        """Latents that are b's alone: both |ν| below the cut-offs (Minder et al. 2025), and β_error at b large enough.

        The last is 1 for a latent whose direction is right at b, 0 for one whose decoder row there is left over from
        the start of training and explains nothing: its ν is the ratio of two numbers near 0, and says nothing.
        """
        low = (self.nu_error.abs() < nu_error) & (self.nu_reconstruction.abs() < nu_reconstruction)
        return low & (self.beta_error_b >= least_beta)

    def table(self) -> pa.Table:
        """One row per latent; NaN is null, and what the numbers are of stands in the metadata."""
        columns = {"latent": pa.array(range(len(self.num_active)), pa.int32())}
        columns["num_active"] = pa.array(self.num_active.numpy())
        columns |= {name: _column(getattr(self, name)) for name in NUMBERS}
        if self.intervals is not None:
            columns["num_documents"] = pa.array(self.intervals.num_documents.numpy())
            for name in INTERVALS:
                ends = getattr(self.intervals, name)
                columns |= {f"{name}_low": _column(ends[:, 0]), f"{name}_high": _column(ends[:, 1])}
        said = {"a": self.a, "b": self.b, "space": self.space, "reconstruction": self.reconstruction}
        why = {} if self.reason is None else {"reason": self.reason}
        return pa.table(columns).replace_schema_metadata(said | why)


def latent_scaling(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    *,
    a: str,
    b: str,
    space: Space = "normalised",
    reconstruction: ReconstructionKind = "full",
    bootstrap: Bootstrap | None = Bootstrap(),  # noqa: B008 (frozen)
    ancestry: Ancestry | None = None,
) -> LatentScaling:
    """Scaling of all latents between two written sources, in one pass over `activations.contexts()` in eval mode.

    `a` and `b` are source keys, or aliases of models with one source. `ancestry` of the two models, where it was
    measured, says whether their activations can be compared at all. For several pairs, both directions, or to share the
    pass with an evaluation, use `ScalingSums` and `scaling`.
    """
    sums = ScalingSums(crosscoder, [(a, b)], bootstrap=bootstrap)
    watch_reconstructions(crosscoder, activations, [sums])
    return scaling(sums, a=a, b=b, space=space, reconstruction=reconstruction, ancestry=ancestry)


@torch.no_grad()
def scaling(
    sums: ScalingSums,
    *,
    a: str,
    b: str,
    space: Space = "normalised",
    reconstruction: ReconstructionKind = "full",
    ancestry: Ancestry | None = None,
) -> LatentScaling:
    """Scaling of one of the pairs that the sums are of, as of the rows seen so far."""
    pair = sums.key(a=a, b=b)
    reason = sums.reason(pair) or _unrelated(sums, pair, ancestry)
    if reason is None:
        numbers = _numbers(sums, pair, space=space, reconstruction=reconstruction)
    else:
        numbers = dict.fromkeys(NUMBERS, torch.full((sums.crosscoder.num_latents,), torch.nan, dtype=torch.float64))
    return LatentScaling(
        *pair,
        space=space,
        reconstruction=reconstruction,
        num_active=sums.num_active.cpu(),
        intervals=None if reason else _intervals(sums, pair, space=space, reconstruction=reconstruction),
        reason=reason,
        **numbers,
    )


def _unrelated(sums: ScalingSums, pair: Pair, ancestry: Ancestry | None) -> str | None:
    """Why the models of the pair cannot be compared, by what was measured; two sites of one model always can."""
    model_a, model_b = (sums.crosscoder.writes[key].model for key in pair)
    return None if ancestry is None or model_a == model_b else ancestry.between(model_a, model_b).reason


def _numbers(sums: ScalingSums, pair: Pair, *, space: Space, reconstruction: ReconstructionKind) -> dict[str, Tensor]:
    found = sums.pair(pair).of(slice(None), slice(1))
    ratios = _ratios(found, space=space, kind=reconstruction)
    sides = {side: _betas(found, at, space=space, kind=reconstruction) for side, at in found.sides.items()}
    betas = {f"beta_{target}_{side}": b for side, of in sides.items() for target, b in of.items()}
    return {name: values[:, 0].cpu() for name, values in (betas | ratios).items()}


def _ratios(sums: PairSums, *, space: Space, kind: ReconstructionKind) -> dict[str, Float[Tensor, "latents draws"]]:
    """ν of every target."""
    a, b = (_betas(sums, side, space=space, kind=kind) for side in sums.sides.values())
    return {f"nu_{target}": a[target] / b[target] for target in TARGETS}


def _betas(
    sums: PairSums, side: Side, *, space: Space, kind: ReconstructionKind
) -> dict[str, Float[Tensor, "latents draws"]]:
    """β of every target at one side of a pair; 0/0 = NaN without activity or direction."""
    below = sums.squares * sums.norm[:, None]
    own = (side.own / sums.norm)[:, None]
    reconstructed, error = side.reconstruction / below, side.error / below
    left_out = own if kind == "leave_one_out" else torch.zeros_like(own)
    betas = {
        "activation": reconstructed + error,
        "activation_no_bias": reconstructed + error - sums.values * side.bias[:, None] / below,
        "reconstruction": reconstructed - left_out,
        "error": error + own,
    }
    if space == "normalised":
        return betas
    mean = sums.at_b.scale * sums.values * side.mean[:, None] / below
    raw = {target: beta * (sums.at_b.scale / side.scale) for target, beta in betas.items()}
    return raw | {target: raw[target] + mean for target in ("activation", "reconstruction")}


def _intervals(
    sums: ScalingSums, pair: Pair, *, space: Space, reconstruction: ReconstructionKind
) -> ScalingIntervals | None:
    """Percentiles of ν over the draws, some latents at a time."""
    if sums.bootstrap is None:
        return None
    whole, tail, num_latents = sums.pair(pair), (1 - sums.bootstrap.level) / 2, len(sums.num_active)
    parts: list[dict[str, Tensor]] = []
    for first in range(0, num_latents, _BLOCK):
        block = whole.of(slice(first, first + _BLOCK), slice(1, None))
        ratios = _ratios(block, space=space, kind=reconstruction)
        parts.append({name: _percentiles(ratios[name], tail) for name in INTERVALS})
    few = (sums.num_documents < MIN_DOCUMENTS).cpu()
    ends = {name: torch.cat([part[name] for part in parts]) for name in INTERVALS}
    return ScalingIntervals(
        level=sums.bootstrap.level,
        num_draws=sums.bootstrap.num_draws,
        num_documents=sums.num_documents.cpu(),
        **{name: found.masked_fill(few[:, None], torch.nan) for name, found in ends.items()},
    )


def _percentiles(draws: Float[Tensor, "latents draws"], tail: float) -> Float[Tensor, "latents 2"]:
    """Both ends, over the draws in which a latent is active at all."""
    at = draws.new_tensor([tail, 1 - tail])
    return draws.nanquantile(at, dim=1).T.cpu()


def _column(values: Float[Tensor, "latents"]) -> pa.Array:
    return pa.array(values.numpy(), from_pandas=True)
