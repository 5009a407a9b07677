"""Rows with planted structure, on the device: sums of a few directions out of many, and noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize


@dataclass(frozen=True)
class Size:
    """A dictionary and its batch."""

    widths: tuple[int, ...]
    num_latents: int
    rows: int
    k: int

    @property
    def width(self) -> int:
        """The width of packed rows."""
        return sum(self.widths)


SMALL = Size((512, 512), 8192, 2048, 64)
GEMMA = Size((2304, 2304), 73728, 4096, 100)
TINY = Size((12, 20), 40, 12, 3)


class World:
    """`x_r = c (Σ a_j u_j + noise)` over k of F / 2 directions u, some of them far more frequent than others."""

    def __init__(self, size: Size, *, device: str, seed: int = 0) -> None:
        self.size, self.generator = size, torch.Generator(device).manual_seed(seed)
        directions = torch.randn(size.num_latents // 2, size.width, generator=self.generator, device=device)
        self.directions = normalize(directions, dim=1)

    def rows(self, count: int | None = None) -> Tensor:
        """Fresh rows, whose mean square is about the width."""
        count, k, g = count or self.size.rows, self.size.k, self.generator
        device = self.directions.device
        rank = torch.rand(count, k, generator=g, device=device).square()
        chosen = (rank * len(self.directions)).long()
        strength = 1 + torch.rand(count, k, generator=g, device=device)
        x = embedding_bag(chosen, self.directions, per_sample_weights=strength, mode="sum")
        x += 0.5 * torch.randn(x.shape, generator=g, device=device) / self.size.width**0.5
        return x * (self.size.width / (k * 7 / 3)) ** 0.5
