"""A small source of activations with sparse structure, for tests of training: deterministic and resumable."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder.activations import Batch, State
from crosscoder.sources import Source, SourceSet

SOURCES = SourceSet([Source("base", "embed", 10), Source("chat", "embed", 14)])


class ToyWorld:
    """Rows that are sparse combinations of fixed directions; batch n depends on the seed and n alone."""

    def __init__(self, sources: SourceSet = SOURCES, *, seed: int = 0, num_concepts: int = 40) -> None:
        self._sources, self._seed, self._drawn = sources, seed, 0
        g = torch.Generator().manual_seed(seed)
        self._directions = torch.nn.functional.normalize(torch.randn(num_concepts, sources.width, generator=g), dim=1)

    @property
    def sources(self) -> SourceSet:
        return self._sources

    def rows(self, n: int, number: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 * self._seed + number)
        fires = torch.rand(n, len(self._directions), generator=g) < 0.08
        return (fires * torch.rand(fires.shape, generator=g) * 5) @ self._directions + 0.5

    def batches(self, batch_size: int) -> Iterator[Batch]:
        while True:
            self._drawn += 1
            yield Batch(self.rows(batch_size, self._drawn))

    def contexts(self) -> Iterator[Batch]:
        yield Batch(self.rows(256, 10**6))

    def state_dict(self) -> State:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: State) -> None:
        self._drawn = state["drawn"]
