"""Dense reference kernels: the definition, in any dtype, by plain torch operations and autograd.

    select:  f = p · 1[kept]      decode:  ŷ = f W_dec

Every other backend is tested against these in fp64.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def top_k_mask(score: Float[Tensor, "rows latents"], k: int) -> Bool[Tensor, "rows latents"]:
    """The k largest scores of every row, where they are positive."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(1, score.topk(min(k, score.shape[1]), dim=1).indices, True)
    return mask & (score > 0)


def batch_top_k_mask(score: Float[Tensor, "rows latents"], k: int) -> Bool[Tensor, "rows latents"]:
    """The k·rows largest scores of the batch, where they are positive."""
    count = min(k * score.shape[0], score.numel())
    mask = torch.zeros_like(score, dtype=torch.bool).flatten()
    mask[score.flatten().topk(count).indices] = True
    return mask.view_as(score) & (score > 0)


def decode(f: Float[Tensor, "rows latents"], decoder: Float[Tensor, "latents width"]) -> Float[Tensor, "rows width"]:
    """`f W_dec`, with every zero multiplied out."""
    return f @ decoder
