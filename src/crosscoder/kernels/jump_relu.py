"""JumpReLU with a straight-through gradient of its threshold.

    f = p · 1[p > θ]      ∂f/∂p = 1[p > θ]      ∂f/∂θ = −(θ/ε) · 1[|p − θ| < ε/2]

The last is the exact derivative of `E_u f(p + u)`, u uniform on [−ε/2, ε/2]: of f smoothed over the window. It acts on
silent latents too: what it is given must hold every pair within the window. Source: Rajamanoharan et al. 2024, eq. 11;
bandwidth ε of the January 2025 recipe. The threshold is kept as its logarithm, whose gradient has another factor θ by
the chain rule.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = (grad_outputs[0] * near).sum_to_size(threshold.shape) * (-threshold / ctx.bandwidth)
        return grad_outputs[0] * (pre > threshold), grad_threshold, None


def jump_relu(
    pre: Float[Tensor, "*rows pairs"], threshold: Float[Tensor, "pairs"], *, bandwidth: float
) -> Float[Tensor, "*rows pairs"]:
    """`p · 1[p > θ]` of a full matrix or of pairs, differentiable in `p` and, through the window, in the thresholds."""
    return _JumpReLU.apply(pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]
