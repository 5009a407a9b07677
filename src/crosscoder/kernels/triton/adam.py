"""Adam in one pass over a parameter, with the clip, the skip, the bf16 copy and the norms that follow from it.

    ĝ = g / max(1, (‖g‖ + 1e-6) / c)                        over all parameters; c = infinity is no clip
    m ← β₁ m + (1 − β₁) ĝ        v ← β₂ v + (1 − β₂) ĝ²
    w ← w − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

as `torch.optim.Adam(fused=True)` computes it (Kingma & Ba 2015), but for one deviation: when ‖g‖ is not finite, nothing
changes, neither weights nor moments nor t. While a row is in registers its bf16 copy is written, rounded to nearest
even, and so is the sum of squares of each of its stretches (the decoder norms at each source). The scalars of the step
are computed on the device, in fp64. Reads 16 bytes and writes 12 for every parameter, 2 more for a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from crosscoder.kernels.triton.launching import launch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
KEEP1 = tl.constexpr(BETA1)
NEW1 = tl.constexpr(1 - BETA1)
KEEP2 = tl.constexpr(BETA2)
NEW2 = tl.constexpr(1 - BETA2)
SMALL = tl.constexpr(EPSILON)
COLUMNS = tl.constexpr(1024)
LONGEST_ROW = 4096
NUM_WARPS = 4


@triton.jit
@no_type_check
def _rounded(w):
    """The bits of `w` as bf16, to nearest even; `w` is finite."""
    bits = w.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
@no_type_check
def _adam(param, grad, exp_avg, exp_avg_sq, scalars, copy, squares, ends: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    first, last, longest = 0, ends[0], ends[0]
    for i in tl.static_range(1, len(ends)):
        first = tl.where(stretch == i, ends[i - 1], first)
        last = tl.where(stretch == i, ends[i], last)
        longest = max(longest, ends[i] - ends[i - 1])
    divisor, step_size = tl.load(scalars), tl.load(scalars + 1)
    root, update = tl.load(scalars + 2), tl.load(scalars + 3) != 0.0
    total = tl.zeros([COLUMNS], tl.float32)
    for block in range(0, tl.cdiv(longest, COLUMNS)):
        columns = first + block * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < last
        places = row * ends[len(ends) - 1] + columns
        w = tl.load(param + places, mask=inside, other=0.0)
        if update:
            g = tl.load(grad + places, mask=inside, other=0.0) / divisor
            m = KEEP1 * tl.load(exp_avg + places, mask=inside, other=0.0) + NEW1 * g
            v = KEEP2 * tl.load(exp_avg_sq + places, mask=inside, other=0.0) + NEW2 * g * g
            w -= step_size * m / (tl.sqrt(v) / root + SMALL)
            tl.store(param + places, w, mask=inside)
            tl.store(exp_avg + places, m, mask=inside)
            tl.store(exp_avg_sq + places, v, mask=inside)
        if copy is not None:
            tl.store(copy + places, _rounded(w), mask=inside)
        total += w * w
    if squares is not None:
        tl.store(squares + row * len(ends) + stretch, tl.sum(total))


@dataclass(frozen=True)
class Scalars:
    """What one step has for all parameters: clip divisor, step size, √(1 − β₂ᵗ), and whether it is made at all."""

    packed: Float[Tensor, "four"]


def scalars(step: Int[Tensor, ""], *, norm: Float[Tensor, ""], max_norm: float, learning_rate: float) -> Scalars:
    """The scalars of the update that follows `step` updates (int64 on the device), which is counted here.

    `norm` is that of all gradients together. When it is not finite, the update will change nothing, and is not counted.
    """
    finite = norm.isfinite()
    step += finite
    number = step.clamp(min=1).double()
    divisor = ((norm.double() + 1e-6) / max_norm).clamp(min=1.0)
    step_size = learning_rate / (1 - BETA1**number)
    root = (1 - BETA2**number).sqrt()
    return Scalars(torch.stack([divisor, step_size, root, finite.double()]).float())


def adam(
    param: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    *,
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    scalars: Scalars,
    copy: BFloat16[Tensor, "*shape"] | None = None,
    widths: tuple[int, ...] | None = None,
) -> Float[Tensor, "rows stretches"] | None:
    """Update `param` and its moments in place, all fp32 and contiguous; write `copy`, its bf16 shadow, where given.

    With `widths`, the lengths of the stretches that a row (last dimension) divides into, gives the sum of squares of
    every row's stretches after the update. The gradient is not changed.
    """
    for tensor in (param, grad, exp_avg, exp_avg_sq, *([] if copy is None else [copy])):
        assert tensor.is_contiguous() and tensor.shape == param.shape, "the kernel walks all of them alike"
    width = param.shape[-1] if widths or param.ndim > 1 else _row_length(param.numel())
    ends = tuple(sum(widths[: i + 1]) for i in range(len(widths))) if widths else (width,)
    assert ends[-1] == width, "the stretches make up the row"
    rows = param.numel() // max(1, width)
    squares = torch.empty(rows, len(ends), device=param.device) if widths else None
    bits = None if copy is None else copy.view(torch.int16)
    moments = (exp_avg, exp_avg_sq)
    launch(_adam, (rows, len(ends)), param, grad, *moments, scalars.packed, bits, squares, ends, warps=NUM_WARPS)
    return squares


def _row_length(size: int) -> int:
    """The largest divisor of `size` that is no longer than a row should be."""
    return next(length for length in range(min(size, LONGEST_ROW), 0, -1) if size % length == 0) if size else 1
