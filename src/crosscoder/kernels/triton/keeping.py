"""Keeping: the candidates that a threshold and a budget let through, group by group, in arrays of static capacity.

    kept  ⇔  s > T,   or   s = T > 0 and no more than m − #{s > T} such pairs precede it

Pairs precede by row, then group, then latent. The budget m belongs to the batch (BatchTopK) or to each row (TopK).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.kernels.triton.candidates import Scored
from crosscoder.kernels.triton.patterns import PaddedPattern, Selected, from_zero


@dataclass(frozen=True)
class _Ties:
    """One group's pairs above the threshold and on it, and how many there are in every row."""

    above: Bool[Tensor, "pairs"]
    tied: Bool[Tensor, "pairs"]
    num_above: Int[Tensor, "rows"]
    num_tied: Int[Tensor, "rows"]
    rank: Int[Tensor, "pairs"]
    """Which of its row's tied pairs in this group a pair is, from 1."""


def keep_of_batch(
    found: Sequence[Scored], *, threshold: Float[Tensor, ""], budget: int, capacity: int
) -> tuple[Selected, ...]:
    """The `budget` first pairs of the whole batch at or above one threshold."""
    ties = [_ties(part, threshold) for part in found]
    room = budget - torch.stack([part.num_above.sum() for part in ties]).sum()
    tied = torch.stack([part.num_tied for part in ties], dim=1)
    before = from_zero(tied.flatten().cumsum(0))[:-1].view_as(tied)
    return _kept(found, ties, before=before, room=room.expand(len(tied)), capacity=capacity)


def keep_of_rows(
    found: Sequence[Scored], *, thresholds: Float[Tensor, "rows"], budget: int, capacity: int
) -> tuple[Selected, ...]:
    """The `budget` first pairs of every row at or above the row's own threshold."""
    ties = [_ties(part, thresholds[part.pattern.row_ids]) for part in found]
    room = budget - torch.stack([part.num_above for part in ties]).sum(0)
    tied = torch.stack([part.num_tied for part in ties], dim=1)
    return _kept(found, ties, before=tied.cumsum(1) - tied, room=room, capacity=capacity)


def keep_where(found: Scored, keep: Bool[Tensor, "pairs"], *, capacity: int) -> Selected:
    """The pairs for which `keep` holds, moved together; raw values, zero behind them."""
    places = from_zero(keep.cumsum(0))
    slots = torch.where(keep, places[:-1], capacity)  # what is not kept goes to a slot that is cut off
    latents = _scattered(found.pattern.latents, slots, capacity=capacity)
    values = _scattered(found.values, slots, capacity=capacity)
    pointers = places[found.pattern.row_pointers]
    return Selected(PaddedPattern(pointers, latents, found.pattern.num_latents), values)


def _ties(found: Scored, threshold: Tensor) -> _Ties:
    """`threshold` is one for all pairs or has one entry for each."""
    pointers, rows = found.pattern.row_pointers, found.pattern.row_ids
    above = found.scores > threshold
    tied = (found.scores == threshold) & (threshold > 0)
    places = from_zero(tied.cumsum(0))
    starts = places[pointers]
    return _Ties(above, tied, from_zero(above.cumsum(0))[pointers].diff(), starts.diff(), places[1:] - starts[rows])


def _kept(
    found: Sequence[Scored], ties: Sequence[_Ties], *, before: Tensor, room: Tensor, capacity: int
) -> tuple[Selected, ...]:
    kept: list[Selected] = []
    for i, (part, tie) in enumerate(zip(found, ties, strict=True)):
        rows = part.pattern.row_ids
        first = before[rows, i] + tie.rank <= room[rows]
        kept.append(keep_where(part, tie.above | (tie.tied & first), capacity=capacity))
    return tuple(kept)


def _scattered(source: Tensor, slots: Tensor, *, capacity: int) -> Tensor:
    return source.new_zeros(capacity + 1).scatter_(0, slots, source)[:capacity]
