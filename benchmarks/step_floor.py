"""The floor: what a step must cost at the rates that this machine reaches, measured in the same run.

    dense    5 products of 2 B D F operations + Adam
    sparse   1 product + p written and read + 4 sparse products of 2 k B D operations + Adam

Adam reads and writes 28 bytes per parameter (weight, gradient, two moments). A rate is the best that was seen: the
product at the encoder's own shape, in float32 and bfloat16; copying, reads and writes counted; torch's fused Adam.
Where others had the cores all the time, rates are too low and floors too high.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from step_sizes import Size
from torch import nn

ADAM_BYTES = 28
COPIED = 1 << 26
"""Numbers that are copied: 256 MB, far more than any cache."""


@dataclass(frozen=True)
class Rates:
    """Operations or bytes per second."""

    float32: float
    bfloat16: float
    copy: float
    adam: float

    def best(self, other: Rates) -> Rates:
        """The higher of each."""
        return Rates(*(max(pair) for pair in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, float, float, float]:
        """In order."""
        return self.float32, self.bfloat16, self.copy, self.adam


@dataclass(frozen=True)
class Floor:
    """Seconds of a step at these rates."""

    dense: float
    sparse: float
    sparse_bfloat16: float


def floor(size: Size, rates: Rates) -> Floor:
    """The floors of a size."""
    product = 2.0 * size.batch_size * size.total_width * size.num_latents
    adam = ADAM_BYTES * size.num_weights / rates.adam
    scores = 2.0 * size.batch_size * size.num_latents
    after = 4 * 2.0 * size.num_active * size.total_width / rates.float32 + adam
    return Floor(
        dense=5 * product / rates.float32 + adam,
        sparse=product / rates.float32 + 4 * scores / rates.copy + after,
        sparse_bfloat16=product / rates.bfloat16 + 2 * scores / rates.copy + after,
    )


class RateMeter:
    """Measures each rate once per turn."""

    def __init__(self, size: Size) -> None:
        self._size = size
        shape = size.batch_size, size.total_width
        self._x, self._weights = torch.randn(shape), torch.randn(size.num_latents, size.total_width)
        self._halves = self._x.bfloat16(), self._weights.bfloat16()
        self._from, self._to = torch.ones(COPIED), torch.empty(COPIED)
        self._parameter = nn.Parameter(torch.randn(size.num_weights // 2))
        self._parameter.grad = torch.full_like(self._parameter, 1e-3)
        self._adam = torch.optim.Adam([self._parameter], lr=1e-6, fused=True)
        self.measure()  # warms up

    def measure(self) -> Rates:
        """All rates, each over as many repetitions as a tenth of a second holds."""
        size, (x, weights) = self._size, self._halves
        product = 2.0 * size.batch_size * size.total_width * size.num_latents
        return Rates(
            product / _seconds(lambda: self._x @ self._weights.T),
            product / _seconds(lambda: x @ weights.T),
            8.0 * COPIED / _seconds(lambda: self._to.copy_(self._from)),
            ADAM_BYTES * self._parameter.numel() / _seconds(self._adam.step),
        )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of several times."""
    taken, end = list[float](), time.perf_counter() + 0.1
    while len(taken) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)
