"""Candidates for a code: every pair whose score might be above a cut, found block by block.

    pair (r, i) is a candidate if  x̃_r · e_i + b_i > c_i          c_i a cut per latent

In full precision (fp32, fp64) that is the answer. With a *proposer*, a bf16 copy of the encoder, the product runs at
several times the speed, pairs above the cut are proposed by it, and every proposed value is computed again in fp32:

    proposed   acc + β_i > 0,   acc = bf16(x̃_r) · bf16(e_i) summed in fp32,   β_i = b_i − c_i rounded up to bf16
    value      x̃_r · e_i + b_i in fp32
    deviation  max over proposed pairs of |value − acc − b_i| · g_i, less what rounding the sum to bf16 may have added

Since β_i is rounded up and rounding keeps a sign, a pair that is not proposed has a value of at most c_i + δ with δ
its own bf16 error; the largest error seen among proposed pairs, doubled, stands for δ, and selections that lie within
that of the cut are made again with a lower one (`selection.py`). What is kept is then what fp32 keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.codes import pointers
from crosscoder.kernels import torch_ops

BLOCK_ELEMENTS = 2**22
BLOCK_LATENTS = 2048
NEVER = -1e30
BF16_ROUNDING = 2.0**-8
"""No number moves by more than this share of itself when it is rounded to bf16."""


@dataclass(frozen=True)
class Encoding:
    """One group's side of a selection: its reads, its encoder, the gate, and the proposer where one is used."""

    x: Float[Tensor, "rows reads"]
    encoder: Float[Tensor, "latents reads"]
    bias: Float[Tensor, "latents"]
    gate: Float[Tensor, "latents"]
    proposer: Float[Tensor, "latents reads"] | None = None

    @property
    def num_latents(self) -> int:
        """Latents of the group."""
        return self.bias.shape[0]

    def scores(self, rows: Tensor) -> Float[Tensor, "some latents"]:
        """Scores of a few rows on all latents, in full precision."""
        return torch.addmm(self.bias, self.x[rows], self.encoder.T) * self.gate

    def proposed(self, rows: slice) -> Float[Tensor, "some latents"]:
        """Pre-activations of some rows on all latents, as the proposer gives them, or in full precision without one."""
        if self.proposer is None:
            return torch.addmm(self.bias, self.x[rows], self.encoder.T)
        return torch.addmm(self.bias.to(torch.bfloat16), self.rounded_x[rows], self.proposer.T)

    @cached_property
    def rounded_x(self) -> Tensor:
        """The reads in bf16."""
        return self.x.to(torch.bfloat16)


@dataclass(frozen=True)
class Candidates:
    """Pairs above the cut, sorted by latent, rows ascending within one; values and scores in full precision."""

    rows: Int[Tensor, "found"]
    latents: Int[Tensor, "found"]
    values: Float[Tensor, "found"]
    scores: Float[Tensor, "found"]
    num_latents: int
    deviation: float = 0.0
    """The largest error of the proposing product, in units of scores."""


def above(
    encodings: Sequence[Encoding], cuts: Sequence[Float[Tensor, "_"]], *, at_most: int
) -> list[Candidates] | None:
    """Candidates of several groups, each with a cut per latent; None once there are more than `at_most`."""
    found: list[Candidates] = []
    for encoding, cut in zip(encodings, cuts, strict=True):
        found_here = _above(encoding, cut, at_most=at_most)
        if found_here is None:
            return None
        found.append(found_here)
        at_most -= found_here.rows.shape[0]
    return found


def _above(encoding: Encoding, cut: Tensor, *, at_most: int) -> Candidates | None:
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for block in _blocks(encoding):
        pairs.append(_pairs_of(encoding, cut, *block))
        at_most -= pairs[-1][0].shape[0]
        if at_most < 0:
            return None
    rows, latents, seen = (torch.cat(column) for column in zip(*pairs, strict=True))
    order = latents.argsort(stable=True)  # within a block pairs lie row by row
    rows, latents, seen = rows[order], latents[order], seen[order]
    if encoding.proposer is None:
        return Candidates(rows, latents, seen, seen * encoding.gate[latents], encoding.num_latents)
    return _refined(encoding, cut, rows, latents, seen=seen)


def _blocks(encoding: Encoding) -> Iterator[tuple[slice, slice]]:
    num_rows = encoding.x.shape[0]
    width = min(BLOCK_LATENTS, encoding.num_latents)
    height = max(1, min(num_rows, BLOCK_ELEMENTS // width))
    for i in range(0, encoding.num_latents, width):
        for r in range(0, max(num_rows, 1), height):
            yield slice(r, min(r + height, num_rows)), slice(i, min(i + width, encoding.num_latents))


def _pairs_of(encoding: Encoding, cut: Tensor, rows: slice, latents: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, latents and what the product gave: pre-activations, or bf16 distances from the cut."""
    if encoding.proposer is None:
        seen = torch.addmm(encoding.bias[latents], encoding.x[rows], encoding.encoder[latents].T)
        flat = _positions(seen > cut[latents])
    else:
        offset = _rounded_up(encoding.bias[latents] - cut[latents])
        seen = torch.addmm(offset, encoding.rounded_x[rows], encoding.proposer[latents].T)
        flat = _positions(seen.view(torch.int16) > 0)  # a positive bf16 number is a positive integer
    width = seen.shape[1]
    row = flat.div(width, rounding_mode="floor")
    return row + rows.start, flat - row * width + latents.start, seen.view(-1)[flat]


def _positions(mask: Tensor) -> Int[Tensor, "found"]:
    """Where a matrix is true, as flat positions: eight at a time, since few of them are."""
    flat = mask.view(-1)
    if flat.shape[0] % 8 or flat.is_cuda:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    within = flat.view(-1, 8)[words].nonzero()
    return words[within[:, 0]] * 8 + within[:, 1]


def _rounded_up(x: Tensor) -> Tensor:
    """Rounded to bf16, never down; a latent without a cut (−∞) stays a number, so that products do."""
    x = x.clamp(min=NEVER)
    return (x + x.abs() * BF16_ROUNDING).to(torch.bfloat16)


def _refined(encoding: Encoding, cut: Tensor, rows: Tensor, latents: Tensor, *, seen: Tensor) -> Candidates:
    starts = pointers(latents, num_rows=encoding.num_latents)
    products = torch_ops.latent_products((starts, rows), encoding.x, encoding.encoder)
    values, gate = products + encoding.bias[latents], encoding.gate[latents]
    found = Candidates(rows, latents, values, values * gate, encoding.num_latents)
    if not rows.shape[0]:
        return found
    distance, offset = seen.float(), _rounded_up(encoding.bias - cut).float()
    error = (distance - offset[latents] - products).abs_() - distance.abs_() * BF16_ROUNDING
    return replace(found, deviation=_near_the_cut(error * gate, distance * gate))


def _near_the_cut(errors: Tensor, distances: Tensor) -> float:
    """The largest error among an eighth of the pairs, or a thousand, that lie nearest to the cut."""
    num_near = max(errors.shape[0] // 8, 1024)
    sample = distances[:: max(1, errors.shape[0] // 2**14)]
    place = max(1, min(len(sample), round(len(sample) * num_near / errors.shape[0])))
    near = distances <= sample.kthvalue(place).values
    return max(0.0, float(torch.where(near, errors, 0.0).max()))
