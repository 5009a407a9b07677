"""Sparse kernels: everything after the encoder product touches only active pairs (r, i).

    values     v_p = x̃_r · e_i + b_i                    (computed by the dense product, kept where selected)
    decode     ŷ_r = Σ_{p in row r} v_p d_i
    backward   ∂v_p  = ∂ŷ_r · d_i
               ∂d_i  = Σ_{p on i} v_p ∂ŷ_r      ∂e_i = Σ_{p on i} ∂v_p x̃_r      ∂b_i = Σ_{p on i} ∂v_p

Both weight gradients are sums over the transposed list (by latent instead of by row), which is sorted once per code.
Exact: no approximation beyond the order of summation.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosscoder.codes import Pattern


def sum_by_row(
    pattern: Pattern, weights: Float[Tensor, "active"], table: Float[Tensor, "latents width"]
) -> Float[Tensor, "rows width"]:
    """`Σ_{p in row r} weights_p · table[latent_p]` for every row."""
    return _segment_sums(pattern.latents, table, pattern.row_pointers, weights)


def sum_by_latent(
    pattern: Pattern, weights: Float[Tensor, "active"], table: Float[Tensor, "rows width"]
) -> Float[Tensor, "latents width"]:
    """`Σ_{p on latent i} weights_p · table[row_p]` for every latent."""
    order = pattern.by_latent
    return _segment_sums(pattern.row_ids[order], table, pattern.latent_pointers, weights[order])


def pair_products(
    pattern: Pattern, left: Float[Tensor, "rows width"], right: Float[Tensor, "latents width"]
) -> Float[Tensor, "active"]:
    """`left[row_p] · right[latent_p]` for every pair."""
    zeros = left.new_zeros(pattern.latents.shape[0])
    size = (left.shape[0], pattern.num_latents)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # torch announces that its CSR tensors are in beta
        pairs = torch.sparse_csr_tensor(pattern.row_pointers, pattern.latents, zeros, size=size, check_invariants=False)
        return torch.sparse.sampled_addmm(pairs, left, right.T, beta=0.0).values()


def _segment_sums(index: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    if starts.shape[0] == 1:
        return table.new_zeros(0, table.shape[1])
    return embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, encoder)
        ctx.pattern = pattern
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, encoder = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        needs_x: bool = ctx.needs_input_grad[0]
        grad = grad_outputs[0].contiguous()
        grad_x = sum_by_row(pattern, grad, encoder) if needs_x else None
        grad_bias = sum_by_latent(pattern, grad, x.new_ones(x.shape[0], 1)).squeeze(1)
        return grad_x, sum_by_latent(pattern, grad, x), grad_bias, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, decoder)
        ctx.pattern = pattern
        return sum_by_row(pattern, values, decoder)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        values, decoder = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad = grad_outputs[0].contiguous()
        return pair_products(pattern, grad, decoder), sum_by_latent(pattern, values, grad), None


def encode(
    x: Float[Tensor, "rows width"],
    encoder: Float[Tensor, "latents width"],
    bias: Float[Tensor, "latents"],
    *,
    values: Float[Tensor, "active"],
    pattern: Pattern,
) -> Float[Tensor, "active"]:
    """The pre-activations `values` of the active pairs, with the sparse backward pass attached."""
    return _Encode.apply(x, encoder, bias, values, pattern)  # pyright: ignore[reportReturnType]


def decode(
    values: Float[Tensor, "active"], decoder: Float[Tensor, "latents width"], pattern: Pattern
) -> Float[Tensor, "rows width"]:
    """`Σ_p v_p d_{i(p)}` for every row; differentiable in values and decoder."""
    return _Decode.apply(values, decoder, pattern)  # pyright: ignore[reportReturnType]
