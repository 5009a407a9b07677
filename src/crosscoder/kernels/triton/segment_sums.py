"""Weighted sums of table rows over segments of pairs, by row and by latent, without atomics.

    sum_by_row      y_r = Σ_{p in row r} w_p t_{i(p)}           decoding, gradient of x
    sum_by_latent   s_i = Σ_{p on latent i} w_p t_{r(p)}        gradients of encoder, decoder and bias

A program sums one segment over one stretch of columns, in the order of its list, in fp32. A latent that is active in
more than PIECE rows would keep one program busy long after the others: its list is cut into pieces of that length,
which other programs sum first, and its own program adds the pieces in order. How many pieces there can be is known
from the capacity alone; which latent each belongs to is found on the device. Same input, same bits. Programs of one
stretch run one after the other, so that the stretch of a table stays in the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.codes import Pattern
from crosscoder.kernels.triton.launching import assert_tables, blocks, launch
from crosscoder.kernels.triton.patterns import from_zero

PIECE = tl.constexpr(256)
PAIRS = tl.constexpr(8)
COLUMNS = tl.constexpr(512)
NUM_WARPS = 4
"""Each of the 128 threads has four fp32 columns of all PAIRS rows: sums over rows stay within a thread."""


@triton.jit
@no_type_check
def _weighted_sum(rows, weights, table, begin, end, columns, width):
    """`Σ weights · table[rows]` of the list from `begin` to `end`, over some columns."""
    inside = columns < width
    sums = tl.zeros([COLUMNS], tl.float32)
    while begin < end:
        p = begin + tl.arange(0, PAIRS)
        there = p < end
        row = tl.load(rows + p, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights + p, mask=there, other=0.0).to(tl.float32)
        places = row[:, None] * width + columns[None, :]
        values = tl.load(table + places, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(weight[:, None] * values, axis=0)
        begin += PAIRS
    return sums


@triton.jit
@no_type_check
def _sum_ranges(begins, ends, rows, weights, table, out, width):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(begins + segment), tl.load(ends + segment)
    sums = _weighted_sum(rows, weights, table, begin, end, columns, width)
    tl.store(out + segment * width + columns, sums, mask=columns < width)


@triton.jit
@no_type_check
def _sum_latents(latent_pointers, rows, weights, table, piece_pointers, pieces, out, width):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    begin, end = tl.load(latent_pointers + latent), tl.load(latent_pointers + latent + 1)
    if end - begin <= PIECE:
        sums = _weighted_sum(rows, weights, table, begin, end, columns, width)
        tl.store(out + latent * width + columns, sums, mask=inside)
    else:
        piece, last = tl.load(piece_pointers + latent), tl.load(piece_pointers + latent + 1)
        total = tl.zeros([COLUMNS], tl.float32)
        while piece < last:
            total += tl.load(pieces + piece * width + columns, mask=inside, other=0.0)
            piece += 1
        tl.store(out + latent * width + columns, total, mask=inside)


@dataclass(frozen=True)
class _Pieces:
    """Where the pieces of long lists begin and end, and which pieces belong to each latent."""

    begins: Int[Tensor, "pieces"]
    ends: Int[Tensor, "pieces"]
    pointers: Int[Tensor, "latents_plus_one"]


def sum_by_row(
    pattern: Pattern, weights: Float[Tensor, "active"], table: Float[Tensor, "latents width"]
) -> Float[Tensor, "rows width"]:
    """`Σ_{p in row r} weights_p · table[latent_p]` for every row, in fp32."""
    assert_tables(weights, table)
    table, width = table.contiguous(), table.shape[1]
    out = torch.empty(pattern.num_rows, width, device=table.device)
    grid, starts = (pattern.num_rows, blocks(width, COLUMNS)), pattern.row_pointers
    lists = (pattern.latents, weights.contiguous(), table)
    launch(_sum_ranges, grid, starts, starts[1:], *lists, out, width, warps=NUM_WARPS)
    return out


def sum_by_latent(
    pattern: Pattern,
    weights: Float[Tensor, "active"],
    table: Float[Tensor, "rows width"],
    *,
    out: Float[Tensor, "latents width"] | None = None,
) -> Float[Tensor, "latents width"]:
    """`Σ_{p on latent i} weights_p · table[row_p]` for every latent, in fp32; written into `out` where one is given.

    Zero for a latent without pairs. `out` is fp32 and contiguous.
    """
    assert_tables(weights, table)
    table, width = table.contiguous(), table.shape[1]
    out = torch.empty(pattern.num_latents, width, device=table.device) if out is None else out
    assert out.dtype == torch.float32 and out.is_contiguous(), "the kernel writes whole rows of fp32"
    lists = (pattern.rows_by_latent, weights[pattern.by_latent], table)
    found = _pieces(pattern.latent_pointers, capacity=weights.shape[0])
    stretches = blocks(width, COLUMNS)
    parts = torch.empty(found.begins.shape[0], width, device=table.device)
    launch(_sum_ranges, (len(parts), stretches), found.begins, found.ends, *lists, parts, width, warps=NUM_WARPS)
    grid, starts = (pattern.num_latents, stretches), pattern.latent_pointers
    launch(_sum_latents, grid, starts, *lists, found.pointers, parts, out, width, warps=NUM_WARPS)
    return out


def _pieces(latent_pointers: Tensor, *, capacity: int) -> _Pieces:
    """The pieces of all lists longer than PIECE; at most 2 · capacity / PIECE of them, unused ones empty."""
    size = PIECE.value
    lengths = latent_pointers.diff()
    long = lengths > size
    pointers = from_zero(torch.where(long, (lengths + size - 1) // size, 0).cumsum(0))
    slots = torch.arange(2 * capacity // size if capacity > size else 0, device=latent_pointers.device)
    latents = torch.searchsorted(pointers[1:], slots, right=True).clamp(max=max(0, len(lengths) - 1))
    begins = latent_pointers[latents] + (slots - pointers[latents]) * size
    ends = torch.minimum(begins + size, latent_pointers[latents + 1])
    unused = slots >= pointers[-1]
    return _Pieces(torch.where(unused, 0, begins), torch.where(unused, 0, ends), pointers)
