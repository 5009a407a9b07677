"""Candidates of one latent group: pairs whose approximate score exceeds a cut, with their exact scores.

    s'_{ri} = p'_{ri} g_i          from the stored bf16 product p'
    s_{ri}  = (x_r · e_i + b_i) g_i   from fp32, for candidates only

How far the others can be off is judged by the candidates: s' is rounded to 8 bits, which is known; what |s − s'|
exceeds that by, at most, is what the rounded factors do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.kernels.candidates import BF16_ROUNDING as ROUNDING
from crosscoder.kernels.triton.compaction import Compaction, compact
from crosscoder.kernels.triton.patterns import PaddedPattern
from crosscoder.kernels.triton.row_products import multiply_pairs

NEAR = 0.1


@dataclass(frozen=True)
class GroupScores:
    """What selection needs of one latent group: the approximate product and what it was made from.

    `pre` is `x Eᵀ + b` as the bf16 product gave it (bf16 or fp32, adjacent columns, any row stride; it must stay as it
    is until the selection is made). `x`, `encoder` and `bias` are fp32 and exact. The score of a pair is its
    pre-activation times `gate` (at least 0; a latent with gate 0 is never selected).
    """

    pre: Float[Tensor, "rows latents"]
    gate: Float[Tensor, "latents"]
    x: Float[Tensor, "rows width"]
    encoder: Float[Tensor, "latents width"]
    bias: Float[Tensor, "latents"]

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self.pre.shape[0]

    def latent_cut(self, cut: Float[Tensor, "*one"]) -> Float[Tensor, "latents"]:
        """The pre-activation of every latent at which its score is `cut`."""
        return torch.where(self.gate > 0, cut / self.gate, torch.inf)


@dataclass(frozen=True)
class Scored:
    """Candidate pairs with exact pre-activations and scores; score −∞ where there is none (padding)."""

    pattern: PaddedPattern
    values: Float[Tensor, "pairs"]
    scores: Float[Tensor, "pairs"]
    approximate: Float[Tensor, "pairs"]

    @property
    def errors(self) -> Float[Tensor, "pairs"]:
        """What `|s − s'|` exceeds the rounding of `s'` by; 0 for padding."""
        off = (self.scores - self.approximate).abs() - ROUNDING * self.approximate.abs()
        return torch.where(self.pattern.valid, off.clamp(min=0), 0.0)

    def errors_near(self, cut: Float[Tensor, "*pairs"]) -> Float[Tensor, "pairs"]:
        """The errors of pairs no more than a tenth above a cut, 0 for others: errors grow with scores."""
        return torch.where(self.approximate <= cut + NEAR * cut.abs(), self.errors, 0.0)


@dataclass(frozen=True)
class Buffers:
    """Where one group's candidates are written: pairs, and their products."""

    pairs: Compaction
    products: Float[Tensor, "capacity"]

    @classmethod
    def empty(cls, group: GroupScores, capacity: int) -> Buffers:
        """Room for `capacity` candidates of `group`, or for all its pairs where those are fewer."""
        size = min(capacity, group.pre.numel())
        return cls(Compaction.empty(group.pre, size), torch.zeros(size, device=group.pre.device))

    @property
    def overflow(self) -> Bool[Tensor, ""]:
        """Whether there were more candidates than room."""
        return self.pairs.overflow


def candidates(
    group: GroupScores, latent_cut: Float[Tensor, "latents"], *, into: Buffers, run: Int[Tensor, "one"]
) -> Scored:
    """The pairs of `group` above `latent_cut` with their exact scores; those already in `into` where `run` is zero."""
    pattern = compact(group.pre, latent_cut, into=into.pairs, run=run)
    return refined(group, pattern, into=into.products, limit=pattern.row_pointers[-1:] * run)


def refined(
    group: GroupScores, pattern: PaddedPattern, *, into: Float[Tensor, "pairs"], limit: Int[Tensor, "one"]
) -> Scored:
    """Pairs of `group` with exact scores; the products of the first `limit` are computed, the others are in `into`."""
    products = multiply_pairs(pattern, group.x, group.encoder, into=into, limit=limit)
    latents = pattern.latents
    gate = group.gate[latents]
    values = products + group.bias[latents]
    approximate = group.pre[pattern.row_ids, latents].float() * gate
    return Scored(pattern, values, torch.where(pattern.valid, values * gate, -torch.inf), approximate)
