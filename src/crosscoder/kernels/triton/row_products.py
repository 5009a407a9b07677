"""Products along rows: the error of decoding with its code gradients, and products of pairs.

    decode_error    error_r = target_r − Σ_p v_p d_{i(p)}        products_p = error_{r(p)} · d_{i(p)}
    pair_products   left_{r(p)} · right_{i(p)}

`decode_error` reads every decoder row once: a program holds the rows of up to TILE pairs, WIDTH columns wide, in
registers, subtracts their sum from the target and multiplies what is left with the same registers. Rows with more
pairs are read twice. Programs of one stretch of columns run one after the other, so that the stretch stays in the
second-level cache. What a stretch contributes to the products goes to its own line of a (stretches, pairs) buffer that
is summed afterwards: nothing that a program wrote is read by that program, and nothing is added atomically.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from crosscoder.codes import Pattern
from crosscoder.kernels.operations import DecodeError
from crosscoder.kernels.triton.launching import assert_tables, blocks, launch
from crosscoder.kernels.triton.patterns import PaddedPattern

TILE = tl.constexpr(128)
WIDTH = tl.constexpr(128)
PAIRS = tl.constexpr(8)
COLUMNS = tl.constexpr(256)
ALIGNED = 16
TILE_WARPS = 8
NUM_WARPS = 4


@triton.jit
@no_type_check
def _tile(latents, values, decoder, begin, end, columns, width):
    """Values (TILE,) and decoder rows (TILE, WIDTH) of the pairs from `begin` on, zero past `end`."""
    p = begin + tl.arange(0, TILE)
    there = p < end
    latent = tl.load(latents + p, mask=there, other=0).to(tl.int64)
    value = tl.load(values + p, mask=there, other=0.0).to(tl.float32)
    places = latent[:, None] * width + columns[None, :]
    mask = there[:, None] & (columns < width)[None, :]
    return value, tl.load(decoder + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _decode_error(row_pointers, latents, values, decoder, target, out, width, capacity):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    begin, end = tl.load(row_pointers + row), tl.load(row_pointers + row + 1)
    # `out` holds the errors (rows, width) and behind them what each stretch of columns gives to the products.
    products = out + tl.num_programs(0).to(tl.int64) * width + tl.program_id(1).to(tl.int64) * capacity
    error = tl.load(target + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if end - begin <= TILE:
        value, rows = _tile(latents, values, decoder, begin, end, columns, width)
        error -= tl.sum(value[:, None] * rows, axis=0)
        p = begin + tl.arange(0, TILE)
        tl.store(products + p, tl.sum(error[None, :] * rows, axis=1), mask=p < end)
    else:
        first = begin
        while first < end:
            value, rows = _tile(latents, values, decoder, first, end, columns, width)
            error -= tl.sum(value[:, None] * rows, axis=0)
            first += TILE
        first = begin
        while first < end:
            value, rows = _tile(latents, values, decoder, first, end, columns, width)
            p = first + tl.arange(0, TILE)
            tl.store(products + p, tl.sum(error[None, :] * rows, axis=1), mask=p < end)
            first += TILE
    tl.store(out + row * width + columns, error, mask=inside)


@triton.jit
@no_type_check
def _pair_products(row_ids, latents, limit, left, right, out, width):
    first = tl.program_id(0).to(tl.int64) * PAIRS
    last = tl.load(limit)
    if first < last:
        p = first + tl.arange(0, PAIRS)
        there = p < last
        row = tl.load(row_ids + p, mask=there, other=0).to(tl.int64)
        latent = tl.load(latents + p, mask=there, other=0).to(tl.int64)
        sums = tl.zeros([PAIRS, COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = there[:, None] & (columns < width)[None, :]
            a = tl.load(left + row[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(right + latent[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += a * b
        tl.store(out + p, tl.sum(sums, axis=1), mask=there)


def decode_error(
    pattern: Pattern,
    values: Float[Tensor, "active"],
    decoder: Float[Tensor, "latents width"],
    *,
    target: Float[Tensor, "rows width"],
) -> DecodeError:
    """The error of decoding `values` against `target`, and its product with every active decoder row, in fp32.

    A width that is no multiple of 16 costs a padded copy of both tables: without aligned loads the tile does not fit
    into registers.
    """
    assert_tables(values, decoder, target)
    if decoder.shape[1] % ALIGNED:
        more = (0, -decoder.shape[1] % ALIGNED)
        padded = decode_error(pattern, values, pad(decoder, more), target=pad(target, more))
        return DecodeError(padded.error[:, : decoder.shape[1]], padded.products)
    rows, width, capacity = pattern.num_rows, decoder.shape[1], pattern.latents.shape[0]
    stretches = blocks(width, WIDTH)
    out = torch.empty(rows * width + stretches * capacity, device=decoder.device)
    pairs, tables = (pattern.latents, values.contiguous()), (decoder.contiguous(), target.contiguous())
    grid = (rows, stretches)
    launch(_decode_error, grid, pattern.row_pointers, *pairs, *tables, out, width, capacity, warps=TILE_WARPS)
    products = out[rows * width :].view(stretches, capacity).sum(0)
    if isinstance(pattern, PaddedPattern):
        products = torch.where(pattern.valid, products, 0.0)
    return DecodeError(out[: rows * width].view(rows, width), products)


def pair_products(
    pattern: Pattern, left: Float[Tensor, "rows width"], right: Float[Tensor, "latents width"]
) -> Float[Tensor, "active"]:
    """`left[row_p] · right[latent_p]` for every pair, in fp32; zero for padding."""
    out = torch.zeros(pattern.latents.shape[0], device=left.device)
    return multiply_pairs(pattern, left, right, into=out, limit=pattern.row_pointers[-1:])


def multiply_pairs(
    pattern: Pattern, left: Tensor, right: Tensor, *, into: Tensor, limit: Tensor
) -> Float[Tensor, "active"]:
    """The products of the first `limit` pairs (one element on the device), written into `into`; the others stay."""
    assert_tables(left, right)
    left, right, width = left.contiguous(), right.contiguous(), left.shape[1]
    grid, pairs = (blocks(into.shape[0], PAIRS),), (pattern.row_ids, pattern.latents)
    launch(_pair_products, grid, *pairs, limit, left, right, into, width, warps=NUM_WARPS)
    return into
