"""Exact selection of active latents, a block of rows at a time, so that no (rows × latents) matrix has to exist.

BatchTopK keeps the k·B largest positive scores of the batch. A cut is estimated on the first rows (well below the
expected threshold); every block gives its scores above the cut; the k·B largest of those are the answer if there are
that many, since everything else is smaller. If there are fewer, the cut is lowered and the pass is made again.
No sort of the whole batch, and the result is the same as `reference.batch_top_k_mask` but for ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS = 512
SAMPLE_ROWS = 128
OVERSHOOTS = (1.3, 2.0, 4.0)
"""How many times the candidates needed the cut aims at, try by try; what is left then is to take all positive ones."""

Block = Callable[[int, int], Tensor]
"""Pre-activations (rows, latents) of the rows from first to last."""


class Selection:
    """Active pairs of a batch: rows (sorted), latents and pre-activations."""

    def __init__(self, rows: Int[Tensor, "active"], latents: Int[Tensor, "active"], values: Tensor) -> None:
        self.rows, self.latents, self.values = rows, latents, values

    def renumbered(self, latents: Int[Tensor, "latents"]) -> Selection:
        """The same pairs with each latent under the number that `latents` gives it."""
        return Selection(self.rows, latents[self.latents], self.values)


def above_threshold(
    block: Block, *, num_rows: int, gate: Float[Tensor, "latents"], threshold: Tensor | float
) -> Selection:
    """Every pair whose score is above the threshold."""
    return _above(block, num_rows=num_rows, gate=gate, cut=threshold)


def top_k(block: Block, *, num_rows: int, gate: Float[Tensor, "latents"], k: int) -> Selection:
    """The k largest positive scores of every row."""
    parts: list[Selection] = []
    for first, last in _blocks(num_rows):
        pre = block(first, last)
        score, latents = (pre * gate).topk(min(k, pre.shape[1]), dim=1)
        latents = torch.where(score > 0, latents, pre.shape[1]).sort(dim=1).values  # unused slots go last
        rows, slots = (latents < pre.shape[1]).nonzero(as_tuple=True)
        kept = latents[rows, slots]
        parts.append(Selection(rows + first, kept, pre[rows, kept]))
    return _joined(parts)


def merged(parts: list[Selection], *, num_latents: int) -> Selection:
    """Selections among different latents as one, by row and latent."""
    every = _joined(parts)
    order = (every.rows * num_latents + every.latents).argsort()
    return Selection(every.rows[order], every.latents[order], every.values[order])


def batch_top_k(block: Block, *, num_rows: int, gate: Float[Tensor, "latents"], k: int) -> Selection:
    """The k·rows largest positive scores of the batch."""
    count = k * num_rows
    found = _candidates(block, num_rows=num_rows, gate=gate, k=k)
    if found.values.shape[0] <= count:
        return found
    kept = (found.values * gate[found.latents]).topk(count, sorted=False).indices.sort().values
    return Selection(found.rows[kept], found.latents[kept], found.values[kept])


def _candidates(block: Block, *, num_rows: int, gate: Tensor, k: int) -> Selection:
    """At least the k·rows largest scores, or all that are positive."""
    sample = block(0, min(num_rows, SAMPLE_ROWS)) * gate
    for overshoot in OVERSHOOTS:
        found = _above(block, num_rows=num_rows, gate=gate, cut=_estimated_cut(sample, overshoot * k))
        if found.values.shape[0] >= k * num_rows:
            return found
    return _above(block, num_rows=num_rows, gate=gate, cut=0.0)


def _estimated_cut(score: Float[Tensor, "rows latents"], per_row: float) -> float:
    """A score that about `per_row` pairs per row of the sample exceed; 0 when fewer are positive."""
    sample = score.flatten()
    if per_row * len(score) + 1 >= sample.numel():
        return 0.0
    wanted = int(per_row * len(score)) + 1
    return max(0.0, float(sample.topk(wanted, sorted=False).values.min()))


def _above(block: Block, *, num_rows: int, gate: Tensor, cut: Tensor | float) -> Selection:
    parts: list[Selection] = []
    for first, last in _blocks(num_rows):
        pre = block(first, last)
        score = pre * gate
        rows, latents = (score > cut).nonzero(as_tuple=True)
        parts.append(Selection(rows + first, latents, pre[rows, latents]))
    return _joined(parts)


def _blocks(num_rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, max(num_rows, 1), BLOCK_ROWS):
        yield first, min(first + BLOCK_ROWS, num_rows)


def _joined(parts: list[Selection]) -> Selection:
    return Selection(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.latents for part in parts]),
        torch.cat([part.values for part in parts]),
    )
