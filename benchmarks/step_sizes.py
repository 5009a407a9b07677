"""Sizes of the step benchmark: what a batch and a dictionary look like, and how long weights are trained before timing.

A and C have 16.8 and 25.2 million parameters, whose step is products; B has 151 million, whose step is memory too.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import Wiring, acausal


@dataclass(frozen=True)
class Size:
    """One acausal dictionary and its batches; `training_steps` come before anything is timed."""

    name: str
    num_sources: int
    width: int
    num_latents: int
    batch_size: int
    k: int
    training_steps: int

    @property
    def total_width(self) -> int:
        """Columns of a packed row, `D`."""
        return self.num_sources * self.width

    @property
    def num_weights(self) -> int:
        """Numbers in encoder and decoder together."""
        return 2 * self.num_latents * self.total_width

    @property
    def num_active(self) -> int:
        """Active pairs of a batch, `k · rows`."""
        return self.k * self.batch_size

    @property
    def sources(self) -> SourceSet:
        """Layers of one model."""
        return SourceSet(Source("base", f"layers.{layer}.resid_post", self.width) for layer in range(self.num_sources))

    @property
    def wiring(self) -> Wiring:
        """One group that reads and writes all sources."""
        return acausal(self.sources, num_latents=self.num_latents)

    @property
    def shape(self) -> str:
        """The sizes in letters: S sources of width d, F latents, B rows, k."""
        return f"S={self.num_sources} d={self.width} F={self.num_latents} B={self.batch_size} k={self.k}"


SIZES = {
    size.name: size
    for size in (
        Size("A", 2, 512, 8192, 2048, 64, training_steps=300),
        Size("B", 2, 2304, 16384, 512, 100, training_steps=100),
        Size("C", 12, 256, 4096, 1024, 32, training_steps=300),
    )
}
QUICK = Size("quick", 2, 256, 2048, 1024, 32, training_steps=150)
"""A small A."""
SMALLEST = Size("smallest", 2, 64, 256, 128, 8, training_steps=0)
"""Wakes libraries up."""
