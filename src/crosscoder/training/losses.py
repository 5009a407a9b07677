"""The terms of the loss, in normalised space, each a mean over rows.

    reconstruction   Σ_{s written} ‖x̃_s − x̂̃_s‖²
    L1 of norms      λ Σ_i f_i Σ_s ‖d_i^s‖                                  (Lindsey et al. 2024, section 1.1)
    AuxK             α ‖e − ê‖²,  e = x̃ − x̂̃ detached,  ê = f_dead W_dec[dead], no bias    (Gao et al. 2024, A.2)

AuxK gives dead latents, and nothing else, a gradient: of the dead ones the `k_aux = ½ mean width` with the largest
scores per row reconstruct what the live ones left over. Deviations, so that the term never dominates a step's time: at
most 512 dead latents take part in a step (they take turns), and every fourth row. Decision 7 says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder


def source_errors(error: Float[Tensor, "rows writes"], widths: Sequence[int]) -> Float[Tensor, "sources"]:
    """`‖x̃_s − x̂̃_s‖²` of every written source, mean over rows."""
    return torch.stack([part.square().sum() for part in error.split(list(widths), dim=1)]) / error.shape[0]


def l1_of_norms(code: SparseCode, crosscoder: Crosscoder) -> Float[Tensor, ""]:
    """`Σ_i f_i Σ_s ‖d_i^s‖`, mean over rows; differentiable in values and decoder."""
    norms = torch.cat([_norm_sums(crosscoder, group) for group in range(len(crosscoder.weights))])
    return (code.values * norms[code.latents]).sum() / max(1, code.num_rows)


def auxiliary(
    crosscoder: Crosscoder,
    reads: Float[Tensor, "rows reads"],
    error: Float[Tensor, "rows writes"],
    *,
    dead: Int[Tensor, "dead"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """`‖e − ê‖²` of the dead latents' reconstruction `ê` of the detached error, mean over rows.

    `reads` and `error` are packed over `crosscoder.reads` and `crosscoder.writes`.
    """
    target = error.detach()
    estimate = torch.zeros_like(target)
    for part in crosscoder.group_parts(dead):
        pre = torch.addmm(part.bias, part.read(reads), part.encoder.T)
        score = pre.detach() * part.gate
        kept = score.topk(min(k_aux, score.shape[1]), dim=1)
        values = torch.relu(pre.gather(1, kept.indices))
        f = torch.zeros_like(pre).scatter(1, kept.indices, values)
        estimate = part.add(estimate, f @ part.decoder)
    return (target - estimate).square().sum() / target.shape[0]


def _norm_sums(crosscoder: Crosscoder, group: int) -> Float[Tensor, "latents"]:
    weights, widths = crosscoder.weights[group], crosscoder.group_write_widths(group)
    return torch.stack([part.norm(dim=1) for part in weights.decoder.split(list(widths), dim=1)]).sum(0)
