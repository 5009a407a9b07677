"""SparseCode: the active latents of a batch of rows, in compressed rows.

Row r is active on `latents[p]` with value `values[p]` for p in `row_pointers[r] : row_pointers[r + 1]`.
Within a row latents are sorted; values are raw `f > 0`, never multiplied by the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which (row, latent) pairs are active, by row and, once asked for, by latent."""

    row_pointers: Int[Tensor, "rows_plus_one"]
    latents: Int[Tensor, "active"]
    num_latents: int

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self.row_pointers.shape[0] - 1

    @cached_property
    def row_ids(self) -> Int[Tensor, "active"]:
        """The row of every active pair."""
        rows = torch.arange(self.num_rows, device=self.latents.device)
        return torch.repeat_interleave(rows, self.row_pointers.diff(), output_size=self.latents.shape[0])

    @cached_property
    def by_latent(self) -> Int[Tensor, "active"]:
        """The order that sorts pairs by latent, rows ascending within one."""
        return self.latents.argsort(stable=True)

    @cached_property
    def latent_pointers(self) -> Int[Tensor, "latents_plus_one"]:
        """Where each latent's pairs start in that order."""
        return pointers(self.latents[self.by_latent], num_rows=self.num_latents)


@dataclass(frozen=True)
class SparseCode:
    """The active latents of `num_rows` rows and their values.

    >>> code = SparseCode.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> code.row_pointers.tolist(), code.latents.tolist(), code.values.tolist()
    ([0, 1, 3], [1, 0, 2], [2.0, 1.0, 3.0])
    """

    row_pointers: Int[Tensor, "rows_plus_one"]
    latents: Int[Tensor, "active"]
    values: Float[Tensor, "active"]
    num_latents: int

    @property
    def num_rows(self) -> int:
        """How many rows were encoded."""
        return self.row_pointers.shape[0] - 1

    @property
    def num_active(self) -> int:
        """How many (row, latent) pairs are active."""
        return self.latents.shape[0]

    @cached_property
    def pattern(self) -> Pattern:
        """Which pairs are active, without their values; sorted by latent once, however often it is used."""
        return Pattern(self.row_pointers, self.latents, self.num_latents)

    @property
    def row_ids(self) -> Int[Tensor, "active"]:
        """The row of every active pair."""
        return self.pattern.row_ids

    @property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        return self.num_active / max(1, self.num_rows)

    def to_dense(self) -> Float[Tensor, "rows latents"]:
        """The code as a full matrix; differentiable in the values."""
        dense = self.values.new_zeros(self.num_rows, self.num_latents)
        return dense.index_put((self.row_ids, self.latents), self.values)

    @classmethod
    def from_dense(cls, f: Float[Tensor, "rows latents"]) -> SparseCode:
        """The positive entries of `f`; differentiable in `f`."""
        return cls.from_mask(f, f > 0)

    @classmethod
    def from_mask(cls, f: Float[Tensor, "rows latents"], mask: Tensor) -> SparseCode:
        """The entries of `f` where `mask` holds."""
        rows, latents = mask.nonzero(as_tuple=True)
        return cls(pointers(rows, num_rows=f.shape[0]), latents, f[rows, latents], f.shape[1])

    @classmethod
    def of(cls, pattern: Pattern, values: Float[Tensor, "active"]) -> SparseCode:
        """The code with these values on that pattern, which is shared, not copied."""
        code = cls(pattern.row_pointers, pattern.latents, values, pattern.num_latents)
        code.__dict__["pattern"] = pattern  # what the cached property would compute
        return code

    def detach(self) -> SparseCode:
        """The same code without its graph."""
        return SparseCode.of(self.pattern, self.values.detach())

    def of_latents(self, start: int, stop: int) -> SparseCode:
        """The part on latents `start : stop`, renumbered from zero; differentiable in the values."""
        keep = ((self.latents >= start) & (self.latents < stop)).nonzero().squeeze(1)
        rows = pointers(self.row_ids[keep], num_rows=self.num_rows)
        return SparseCode(rows, self.latents[keep] - start, self.values[keep], stop - start)


def pointers(row_ids: Int[Tensor, "active"], *, num_rows: int) -> Int[Tensor, "rows_plus_one"]:
    """Row pointers of sorted row ids: where each row starts, and the end."""
    edges = torch.arange(num_rows + 1, device=row_ids.device, dtype=row_ids.dtype)
    return torch.searchsorted(row_ids, edges)
