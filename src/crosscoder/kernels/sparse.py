"""Sparse encoding and decoding with their gradients: everything after the encoder product touches only active pairs.

    values     v_p = x̃_r · e_i + b_i                      (computed by the selection, which needs them)
    decode     ŷ_r = b_dec + Σ_{p in row r} v_p d_i       each group onto the columns that it writes
    fit        e = y − ŷ,   L_s = ‖e_s‖² / rows,   L = Σ_s L_s
    backward   ∂v_p  = ∂ŷ_r · d_i                         with ∂ŷ = −(2/rows) e under L
               ∂d_i  = Σ_{p on i} v_p ∂ŷ_r                ∂e_i = Σ_{p on i} ∂v_p x̃_r      ∂b_i = Σ_{p on i} ∂v_p

Exact: no approximation beyond the order of summation. `fit` is one operation because the gradient of a squared error is
the error itself: no matrix of its size is written on the way back. Once differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosscoder.codes import Pattern, SparseCode
from crosscoder.kernels.operations import Operations
from crosscoder.kernels.spares import Spares
from crosscoder.kernels.torch_ops import add_by_latent


class Written(Protocol):
    """Where the product with a group's stored decoder goes among the packed writes."""

    @property
    def everything(self) -> bool:
        """Whether that is all of them, in their order."""
        ...

    def add_(self, writes: Tensor, part: Tensor) -> None:
        """Add the product onto the packed writes, in place."""
        ...

    def gather(self, writes: Tensor) -> Tensor:
        """What a gradient of the packed writes is to the product: the transpose of `add_`."""
        ...


@dataclass(frozen=True)
class Decoding:
    """One group's side of a decode: its code, its stored decoder, where that goes, memory for its gradient, kernels."""

    code: SparseCode
    decoder: Float[Tensor, "latents stored"]
    written: Written
    spares: Spares
    operations: Operations


@dataclass(frozen=True)
class Fit:
    """How far a reconstruction is from its target: `e = y − ŷ`, and `‖e_s‖²` per source, means over rows."""

    error: Float[Tensor, "rows writes"]
    total: Float[Tensor, ""]
    source_errors: Float[Tensor, "sources"]
    """Not differentiable; their sum, `total`, is."""


def encode(
    x: Float[Tensor, "rows reads"],
    encoder: Float[Tensor, "latents reads"],
    bias: Float[Tensor, "latents"],
    *,
    code: SparseCode,
    spares: Spares,
    operations: Operations,
) -> SparseCode:
    """The code with its graph: differentiable in `x`, `encoder` and `bias`."""
    values = _Encode.apply(x, encoder, bias, code, spares, operations)
    return SparseCode.of(code.pattern, values)  # pyright: ignore[reportArgumentType]


def decode(groups: Sequence[Decoding], bias: Float[Tensor, "writes"], *, num_rows: int) -> Float[Tensor, "rows writes"]:
    """Packed writes; differentiable in values, decoders and bias."""
    return _Decode.apply(groups, num_rows, bias, *_tensors(groups))  # pyright: ignore[reportReturnType]


def fit(
    groups: Sequence[Decoding],
    bias: Float[Tensor, "writes"],
    *,
    target: Float[Tensor, "rows writes"],
    widths: Sequence[int],
) -> Fit:
    """Error and squared errors of the reconstruction; differentiable in values, decoders, bias and target."""
    error, total, source_errors = _Fit.apply(groups, widths, target, bias, *_tensors(groups))  # pyright: ignore
    return Fit(error, total, source_errors)


def squared_errors(error: Float[Tensor, "rows writes"], widths: Sequence[int]) -> Float[Tensor, "sources"]:
    """`‖e_s‖²` of every written source, mean over rows."""
    parts = error.split(list(widths), dim=1)
    return torch.stack([torch.linalg.vector_norm(part).square() for part in parts]) / error.shape[0]


def _tensors(groups: Sequence[Decoding]) -> list[Tensor]:
    return [tensor for group in groups for tensor in (group.code.values, group.decoder)]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, code: SparseCode, spares: Spares, ops: Operations
    ) -> Tensor:
        ctx.save_for_backward(x, encoder)
        ctx.pattern, ctx.spares, ctx.ops = code.pattern, spares, ops
        return code.values.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, encoder = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        ops: Operations = ctx.ops
        grad = grad_outputs[0].contiguous()
        needs_x, needs_encoder, needs_bias, *_ = ctx.needs_input_grad
        grad_x = ops.sum_by_row(pattern, grad, encoder) if needs_x else None
        grad_encoder = None
        if needs_encoder:
            grad_encoder = ops.sum_by_latent(pattern, grad, x, out=ctx.spares.take("encoder", encoder))
        grad_bias = add_by_latent(pattern, grad) if needs_bias else None
        return grad_x, grad_encoder, grad_bias, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Sequence[Decoding], num_rows: int, bias: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.groups = groups
        writes = bias.expand(num_rows, -1).clone()
        for group, values, decoder in _by_group(groups, tensors):
            part = group.operations.sum_by_row(group.code.pattern, values, decoder)
            group.written.add_(writes, part)
        return writes

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return None, None, grad_bias, *_gradients(ctx, grad, 1.0)


class _Fit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, groups: Sequence[Decoding], widths: Sequence[int], target: Tensor, bias: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        error, products = _error(groups, tensors, target - bias)
        source_errors = squared_errors(error, widths)
        ctx.groups = groups
        ctx.save_for_backward(*tensors, products, error)
        ctx.mark_non_differentiable(source_errors)
        ctx.set_materialize_grads(False)
        return error, source_errors.sum(), source_errors

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        products: Tensor | None = ctx.saved_tensors[-2] if grad_outputs[0] is None else None
        error, factor = _error_gradient(ctx.saved_tensors[-1], grad_outputs[0], grad_outputs[1])
        grad_target = factor * error if ctx.needs_input_grad[2] else None
        grad_bias = -factor * error.sum(0) if ctx.needs_input_grad[3] else None
        return None, None, grad_target, grad_bias, *_gradients(ctx, error, -factor, products=products)


def _error(
    groups: Sequence[Decoding], tensors: Sequence[Tensor], target: Tensor
) -> tuple[Float[Tensor, "rows writes"], Float[Tensor, "active"] | None]:
    """What the groups leave of the target; and where one group writes all of it, the products with its decoder rows."""
    if len(groups) == 1 and groups[0].written.everything:
        values, decoder = tensors
        found = groups[0].operations.decode_error(groups[0].code.pattern, values, decoder, target=target)
        return found.error, found.products
    for group, values, decoder in _by_group(groups, tensors):
        part = group.operations.sum_by_row(group.code.pattern, -values, decoder)
        group.written.add_(target, part)
    return target, None


def _error_gradient(error: Tensor, grad_error: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient of the error as a matrix and a factor to it: `2/rows · e`, if nothing but the total was used."""
    factor = error.new_zeros(()) if grad_total is None else grad_total * (2 / error.shape[0])
    if grad_error is None:
        return error, factor
    return grad_error + factor * error, torch.ones_like(factor)


def _gradients(
    ctx: Any, grad: Tensor, factor: Tensor | float, *, products: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of values and decoders, group by group, when that of the writes is `factor · grad`.

    `products` are those of `grad` with the pairs' decoder rows, where they are known.
    """
    needed, tensors = ctx.needs_input_grad[-2 * len(ctx.groups) :], ctx.saved_tensors[: 2 * len(ctx.groups)]
    found: list[Tensor | None] = []
    for (group, values, decoder), needs in zip(_by_group(ctx.groups, tensors), _pairs(needed), strict=True):
        pattern, own, ops = group.code.pattern, group.written.gather(grad), group.operations
        pairs = ops.pair_products(pattern, own, decoder) if needs[0] and products is None else products
        found.append(None if pairs is None else pairs * factor)
        found.append(None)
        if needs[1]:
            out = group.spares.take("decoder", decoder)
            found[-1] = ops.sum_by_latent(pattern, values * factor, own, out=out)
    return found


def _by_group(groups: Sequence[Decoding], tensors: Sequence[Tensor]) -> list[tuple[Decoding, Tensor, Tensor]]:
    return [(group, *pair) for group, pair in zip(groups, _pairs(tensors), strict=True)]


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))
