"""Compaction: which entries of a matrix exceed a cut, as pointers and latents of static capacity.

    pair (r, i) is taken  ⇔  pre[r, i] > cut[i]

Three moves without a host synchronisation: count per (row, span of latents), running sums, fill. The order is that of
(row, latent), whatever the schedule. A device flag `run` of zero makes both kernels leave at once and their results as
they were: that is how a second round costs nothing when the first was enough. Offsets are 64 bits wide throughout.
NaN exceeds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.kernels.triton.launching import blocks, launch
from crosscoder.kernels.triton.patterns import PaddedPattern, from_zero

SPAN = tl.constexpr(16384)
BLOCK = tl.constexpr(2048)
LEVEL_BLOCK = tl.constexpr(4096)
NUM_WARPS = 8


@triton.jit
@no_type_check
def _count(pre, cut, run, counts, num_latents, stride):
    program = tl.program_id(0)
    if tl.load(run) != 0:
        spans = tl.cdiv(num_latents, SPAN)
        base = pre + (program // spans).to(tl.int64) * stride
        first = (program % spans) * SPAN
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(first, tl.minimum(first + SPAN, num_latents), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_latents
            p = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
            total += (p > tl.load(cut + columns, mask=inside, other=float("inf"))).to(tl.int32)
        tl.store(counts + program, tl.sum(total).to(tl.int64))


@triton.jit
@no_type_check
def _fill(pre, cut, run, starts, latents, num_latents, stride, capacity):
    program = tl.program_id(0)
    place = tl.load(starts + program)
    found = tl.load(starts + program + 1) - place
    if (tl.load(run) != 0) & (found > 0):
        spans = tl.cdiv(num_latents, SPAN)
        base = pre + (program // spans).to(tl.int64) * stride
        first = (program % spans) * SPAN
        for start in range(first, tl.minimum(first + SPAN, num_latents), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_latents
            p = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
            hit = (p > tl.load(cut + columns, mask=inside, other=float("inf"))).to(tl.int32)
            places = place + tl.cumsum(hit, 0) - 1
            tl.store(latents + places, columns.to(tl.int64), mask=(hit > 0) & (places < capacity))
            place += tl.sum(hit)


@triton.jit
@no_type_check
def _count_levels(pre, gate, levels, run, counts, num_latents, stride, num_levels):
    program = tl.program_id(0)
    if tl.load(run) != 0:
        spans = tl.cdiv(num_latents, SPAN)
        base = pre + (program // spans).to(tl.int64) * stride
        first = (program % spans) * SPAN
        for start in range(first, tl.minimum(first + SPAN, num_latents), LEVEL_BLOCK):
            columns = start + tl.arange(0, LEVEL_BLOCK)
            inside = columns < num_latents
            p = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
            scores = p * tl.load(gate + columns, mask=inside, other=1.0)
            for level in range(0, num_levels):
                above = (scores > tl.load(levels + level)).to(tl.int32)
                tl.atomic_add(counts + level, tl.sum(above).to(tl.int64))


@dataclass(frozen=True)
class Compaction:
    """Buffers of one matrix's compaction: entries per span, and latents up to the capacity."""

    counts: Int[Tensor, "spans"]
    latents: Int[Tensor, "capacity"]
    num_latents: int

    @classmethod
    def empty(cls, pre: Float[Tensor, "rows latents"], capacity: int) -> Compaction:
        """Buffers for `pre` that hold at most `capacity` pairs."""
        spans = pre.shape[0] * blocks(pre.shape[1], SPAN)
        counts = torch.zeros(spans, dtype=torch.int64, device=pre.device)
        return cls(counts, torch.zeros(capacity, dtype=torch.int64, device=pre.device), pre.shape[1])

    @property
    def starts(self) -> Int[Tensor, "spans_plus_one"]:
        """Where each span's pairs start, were the capacity unlimited."""
        return from_zero(self.counts.cumsum(0))

    @property
    def overflow(self) -> Bool[Tensor, ""]:
        """Whether there were more pairs than the capacity."""
        return self.counts.sum() > self.latents.shape[0]

    @property
    def pattern(self) -> PaddedPattern:
        """The pairs that were found, those past the capacity left out."""
        spans = blocks(self.num_latents, SPAN)
        pointers = self.starts[::spans].clamp(max=self.latents.shape[0])
        return PaddedPattern(pointers.contiguous(), self.latents, self.num_latents)


def count(
    pre: Float[Tensor, "rows latents"],
    cut: Float[Tensor, "latents"],
    *,
    into: Compaction,
    run: Int[Tensor, "one"] | None = None,
) -> None:
    """Count the pairs with `pre > cut` into `into.counts`; nothing happens where `run` is zero.

    `pre` is bf16 or fp32 with adjacent columns and any row stride, `cut` fp32, `run` int32 with one element.
    """
    assert pre.stride(1) == 1 or pre.shape[1] == 1, "the columns of a row lie side by side"
    run = pre.new_ones(1, dtype=torch.int32) if run is None else run
    grid, num_latents, stride = (into.counts.shape[0],), pre.shape[1], pre.stride(0)
    launch(_count, grid, pre, cut, run, into.counts, num_latents, stride, warps=NUM_WARPS)


def fill(
    pre: Float[Tensor, "rows latents"],
    cut: Float[Tensor, "latents"],
    *,
    into: Compaction,
    run: Int[Tensor, "one"] | None = None,
) -> PaddedPattern:
    """The pairs that `count` counted, written into `into.latents`; as they were there where `run` is zero."""
    run = pre.new_ones(1, dtype=torch.int32) if run is None else run
    grid, num_latents, stride = (into.counts.shape[0],), pre.shape[1], pre.stride(0)
    capacity = into.latents.shape[0]
    if capacity:
        launch(_fill, grid, pre, cut, run, into.starts, into.latents, num_latents, stride, capacity, warps=NUM_WARPS)
    return into.pattern


def compact(
    pre: Float[Tensor, "rows latents"],
    cut: Float[Tensor, "latents"],
    *,
    into: Compaction,
    run: Int[Tensor, "one"] | None = None,
) -> PaddedPattern:
    """The pairs with `pre > cut`, in the buffers `into`, whose `overflow` tells when they were too small."""
    count(pre, cut, into=into, run=run)
    return fill(pre, cut, into=into, run=run)


def count_levels(
    pre: Float[Tensor, "rows latents"],
    gate: Float[Tensor, "latents"],
    *,
    levels: Float[Tensor, "levels"],
    run: Int[Tensor, "one"],
) -> Int[Tensor, "levels"]:
    """How many entries of `pre · gate` exceed each level; zeros, at once, where `run` is zero."""
    counts = torch.zeros(levels.shape[0], dtype=torch.int64, device=pre.device)
    grid, num_latents, stride = (pre.shape[0] * blocks(pre.shape[1], SPAN),), pre.shape[1], pre.stride(0)
    launch(_count_levels, grid, pre, gate, levels, run, counts, num_latents, stride, len(levels), warps=NUM_WARPS)
    return counts
