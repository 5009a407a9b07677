"""PaddedPattern: active pairs in arrays of static capacity, so that their number never has to reach the host.

Pairs `p < row_pointers[-1]` are active. What follows is padding: latent 0, weight 0, listed under no row and no latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.codes import Pattern


@dataclass(frozen=True)
class PaddedPattern(Pattern):
    """A pattern whose `latents` may be longer than what is active; all it derives leaves the padding out."""

    @cached_property
    def valid(self) -> Bool[Tensor, "active"]:
        """Which entries are active pairs."""
        return torch.arange(self.latents.shape[0], device=self.latents.device) < self.row_pointers[-1]

    @cached_property
    def row_ids(self) -> Int[Tensor, "active"]:
        """The row of every active pair; the last row for padding."""
        places = torch.arange(self.latents.shape[0], device=self.latents.device)
        return torch.searchsorted(self.row_pointers[1:], places, right=True).clamp(max=max(0, self.num_rows - 1))

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        keys = torch.where(self.valid, self.latents, self.num_latents).to(torch.int32)
        return keys.sort(stable=True)

    @cached_property
    def by_latent(self) -> Int[Tensor, "active"]:
        """The order that sorts pairs by latent, rows ascending within one, padding last."""
        return self._sorted[1]

    @cached_property
    def latent_pointers(self) -> Int[Tensor, "latents_plus_one"]:
        """Where each latent's pairs start in that order."""
        edges = torch.arange(self.num_latents + 1, device=self.latents.device, dtype=torch.int32)
        return torch.searchsorted(self._sorted[0], edges)

    @cached_property
    def rows_by_latent(self) -> Int[Tensor, "active"]:
        """The row of every pair, in the order of `by_latent`."""
        return self.row_ids[self.by_latent]


@dataclass(frozen=True)
class Selected:
    """Active pairs of one group and their values `f`, zero where the pattern is padding."""

    pattern: PaddedPattern
    values: Float[Tensor, "active"]


def from_zero(sums: Int[Tensor, "n"]) -> Int[Tensor, "n_plus_one"]:
    """Running sums with the zero that they start from."""
    return torch.cat([sums.new_zeros(1), sums])
