"""The terms of the loss, in normalised space, each a mean over rows.

    reconstruction   Σ_{s written} ‖x̃_s − x̂̃_s‖²
    L1               λ Σ_i w_i f_i n_i                                      (Lindsey et al. 2024, section 1.1)
    tanh             λ Σ_i w_i tanh(c f_i n_i)                              (Anthropic, January 2025)
    pre-activation   λ_P Σ_i max(0, θ_i − p_i) n_i,  on pre-activations     (the same)
    delta            δ ‖e_b √(c_a/c_b) − e_a √(c_b/c_a)‖²                   (Kassem et al. 2026, Delta-Crosscoder)
    AuxK             α ‖e − ê‖²,  e = x̃ − x̂̃ detached,  ê = f_dead W_dec[dead], no bias    (Gao et al. 2024, A.2)

n_i is the code norm of latent i's decoder: by default `Σ_s ‖d_i^s‖`, L1 of norms; `concat` is L2 of norms. w_i is the
penalty of its group. The pre-activation term gives a gradient to silent latents, which is its purpose: it has to see
p, not f. The delta term is the squared error of the raw difference `x_b − x_a`, in units of the geometric mean
`√(c_a c_b)` of the scales, so that it is `‖e_b − e_a‖²` where scales are equal.

AuxK gives dead latents, and nothing else, a gradient: of the dead ones the `k_aux = ½ mean width` with the largest
scores per row reconstruct what the live ones left over. Deviations, so that the term never dominates a step's time: at
most 512 dead latents take part in a step (they take turns), and every fourth row. Decision 7 says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activity import Activity
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.groups import GroupPart, assemble
from crosscoder.nonlinearities import JumpReLU
from crosscoder.sources import Source
from crosscoder.training.config import L1Sparsity, TanhSparsity


@dataclass(frozen=True)
class Auxiliary:
    """AuxK of one step; its graph ends in copies of the dead latents' weights."""

    loss: Float[Tensor, ""]
    parts: Sequence[GroupPart]

    def add_gradients(self) -> None:
        """Put the gradients, once there are some, where the weights are."""
        for part in self.parts:
            part.add_gradients()


def sparsity(
    activity: Activity, crosscoder: Crosscoder, config: L1Sparsity | TanhSparsity, *, coefficient: float
) -> Float[Tensor, ""]:
    """The penalty with `λ = coefficient`, a schedule's; differentiable in values, decoders and thresholds."""
    norms, weights = crosscoder.code_norms(config.code_norm), penalties(crosscoder)
    num_rows = max(1, activity.num_rows)
    if isinstance(config, L1Sparsity):
        return coefficient * (activity.by_latent @ (norms * weights)) / num_rows
    penalty = coefficient * _saturating(activity, config.scale * norms, weights) / num_rows
    if not isinstance(crosscoder.nonlinearity, JumpReLU):
        return penalty
    return penalty + config.preactivation * (_below(activity, crosscoder) @ norms) / num_rows


def penalties(crosscoder: Crosscoder) -> Float[Tensor, "latents"]:
    """What each latent's group multiplies the sparsity coefficient by."""
    parts = [torch.full((group.num_latents,), group.penalty) for group in crosscoder.wiring]
    return torch.cat(parts).to(crosscoder.bias)


def delta(error: Float[Tensor, "rows writes"], crosscoder: Crosscoder, *, a: str, b: str) -> Float[Tensor, ""]:
    """The squared error of the raw difference `x_b − x_a` in units of `√(c_a c_b)`, mean over rows.

    `error` is packed over `crosscoder.writes`; raises SourceMismatch where the widths of the two differ.
    """
    writes, (source_a, source_b) = crosscoder.writes, delta_pair(crosscoder, a, b)
    scale_a, scale_b = (crosscoder.scale[crosscoder.sources.index(s.key)] for s in (source_a, source_b))
    ratio = (scale_a / scale_b).sqrt()
    gap = error[:, writes.slices[source_b.key]] * ratio - error[:, writes.slices[source_a.key]] / ratio
    return gap.square().sum() / error.shape[0]


def delta_pair(crosscoder: Crosscoder, a: str, b: str) -> tuple[Source, Source]:
    """The two written sources of a delta loss; raises SourceMismatch where their widths differ."""
    source_a, source_b = crosscoder.writes.resolve(a), crosscoder.writes.resolve(b)
    if source_a.width != source_b.width or source_a == source_b:
        raise SourceMismatch(
            "the delta loss needs two written sources of one width.",
            details=[f"a  {source_a.key}  width {source_a.width}", f"b  {source_b.key}  width {source_b.width}"],
        )
    return source_a, source_b


def auxiliary(
    crosscoder: Crosscoder,
    reads: Float[Tensor, "rows reads"],
    error: Float[Tensor, "rows writes"],
    *,
    dead: Int[Tensor, "dead"],
    k_aux: int,
    among: Bool[Tensor, "dead"] | None = None,
) -> Auxiliary:
    """`‖e − ê‖²` of the dead latents' reconstruction `ê` of the detached error, mean over rows.

    `reads` and `error` are packed over `crosscoder.reads` and `crosscoder.writes`. Where `among` is given, only those
    of `dead` for which it holds take part: a number of latents that a device need not tell.
    """
    target = error.detach()
    parts = crosscoder.group_parts(dead)
    pre = torch.cat([torch.addmm(part.bias, part.read(reads), part.encoder.T) for part in parts], dim=1)
    pre = pre if among is None else pre.masked_fill(~among, -1.0)
    score = pre.detach() * torch.cat([part.gate for part in parts])
    kept = score.topk(min(k_aux, score.shape[1]), dim=1)
    values = torch.relu(pre.gather(1, kept.indices))
    f = torch.zeros_like(pre).scatter(1, kept.indices, values).split([len(part.bias) for part in parts], dim=1)
    pieces = [piece for mine, part in zip(f, parts, strict=True) for piece in part.pieces(mine @ part.decoder)]
    left = assemble((-target).split(list(crosscoder.writes.widths), dim=1), pieces)
    loss = left.square().sum() / target.shape[0]
    return Auxiliary(loss if among is None else torch.where(among.any(), loss, 0.0), parts)


def _saturating(activity: Activity, scale: Tensor, weights: Tensor) -> Float[Tensor, ""]:
    """`Σ tanh(scale_i f_i) w_i` over rows and latents."""
    if activity.f is not None:
        return torch.tanh(activity.f * scale).sum(0) @ weights
    sizes = [code.num_latents for code in activity.groups]
    groups = zip(activity.groups, scale.split(sizes), weights.split(sizes), strict=True)
    terms = [(torch.tanh(c.values * own[c.latents]) * w[c.latents]).sum() for c, own, w in groups]
    return torch.stack(terms).sum()


def _below(activity: Activity, crosscoder: Crosscoder) -> Float[Tensor, "latents"]:
    """`Σ_rows max(0, θ_i − p_i)`, for sparse codes as `Σ_rows (θ_i − p_i) + Σ_active (p_i − θ_i)`."""
    if activity.f is not None:
        return torch.relu(crosscoder.thresholds - activity.pre[0]).sum(0)
    found: list[Tensor] = []
    for x, code, pre, w in zip(activity.reads, activity.groups, activity.pre, crosscoder.weights, strict=True):
        assert w.log_threshold is not None, "JumpReLU has thresholds"
        threshold = w.log_threshold.exp()
        every = x.shape[0] * (threshold - w.encoder_bias) - w.encoder @ x.sum(0)
        above = torch.relu(pre - threshold[code.latents])
        found.append(every.index_add(0, code.latents, above))
    return torch.cat(found)
