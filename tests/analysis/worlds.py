"""Small things to analyse: a crosscoder with random weights, and activations that are a list of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from crosscoder.activations import Batch, Rows
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, Nonlinearity
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import acausal


class ListedActivations:
    """An ActivationSource of rows at hand, `per_batch` contexts to a batch."""

    def __init__(self, sources: SourceSet, x: torch.Tensor, rows: Rows | None = None) -> None:
        self.sources = sources
        self.x, self.rows = x, rows

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The rows in order, over and over."""
        while True:
            for part in self.x.split(batch_size):
                yield Batch(part)

    def contexts(self) -> Iterator[Batch]:
        """Two contexts at a time where rows are known, else all at once."""
        if self.rows is None:
            yield Batch(self.x)
            return
        for first in range(0, int(self.rows.context.max()) + 1, 2):
            chosen = (self.rows.context // 2 * 2 == first).nonzero().squeeze(1)
            rows = Rows(*(part[chosen] for part in (self.rows.context, self.rows.position, self.rows.role)))
            yield Batch(self.x[chosen], rows)

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def regular_rows(*, num_contexts: int, length: int, first_position: int = 1) -> Rows:
    """Contexts of equal length without their first position, roles going round."""
    context = torch.arange(num_contexts).repeat_interleave(length - first_position)
    position = torch.arange(first_position, length).repeat(num_contexts)
    return Rows(context, position, (position % 5).to(torch.int8))


def random_crosscoder(
    widths: tuple[int, ...] = (6, 6), *, num_latents: int = 20, nonlinearity: Nonlinearity | None = None, seed: int = 0
) -> Crosscoder:
    """A crosscoder of sources base, chat, ... at `embed` with random decoders, biases, mean, scale and threshold."""
    names = ("base", "chat", "other")
    sources = SourceSet([Source(name, "embed", width) for name, width in zip(names, widths, strict=False)])
    kind = nonlinearity or BatchTopK(4)
    cc = Crosscoder(acausal(sources, num_latents=num_latents), kind, seed=seed, across_sources="independent")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        cc.bias.copy_(0.1 * torch.randn(cc.bias.shape, generator=generator))
        cc.weights[0].decoder.mul_(torch.rand(num_latents, 1, generator=generator) + 0.5)
        for weights in cc.weights:
            weights.threshold.fill_(0.3)
    cc.refresh_gate()
    cc.set_normaliser(torch.randn(sources.width, generator=generator), torch.tensor([0.5, 2.0, 3.0])[: len(widths)])
    return cc.eval()


def random_rows(sources: SourceSet, num_rows: int, *, seed: int = 1) -> torch.Tensor:
    """Packed raw activations."""
    return 2 * torch.randn(num_rows, sources.width, generator=torch.Generator().manual_seed(seed))
