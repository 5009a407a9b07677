"""SparseCode: the active latents of a batch of rows, in compressed rows.

Row r is active on `latents[p]` with value `values[p]` for p in `row_pointers[r] : row_pointers[r + 1]`.
Within a row latents are sorted; values are raw `f > 0`, never multiplied by the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def num_active(self) -> int:
        """How many (row, latent) pairs are active."""
        return self.latents.shape[0]

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

    @cached_property
    def rows_by_latent(self) -> Int[Tensor, "active"]:
        """The row of every active pair, in that order."""
        return self.row_ids[self.by_latent]

    @classmethod
    def of_pairs(cls, rows: Int[Tensor, "active"], latents: Int[Tensor, "active"], *, size: tuple[int, int]) -> Pattern:
        """The pattern of pairs that are sorted by row, latents ascending within one; `size` is (rows, latents)."""
        return cls(pointers(rows, num_rows=size[0]), latents, size[1])._knowing(row_ids=rows)

    @classmethod
    def of_latent_order(
        cls, rows: Int[Tensor, "active"], latents: Int[Tensor, "active"], *, size: tuple[int, int]
    ) -> tuple[Pattern, Int[Tensor, "active"]]:
        """The pattern of pairs sorted by latent, rows ascending within one, and the order that sorts them by row.

        `size` is (rows, latents).
        """
        order = rows.argsort(stable=True)
        pattern = cls.of_pairs(rows[order], latents[order], size=size)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        starts = pointers(latents, num_rows=size[1])
        return pattern._knowing(by_latent=back, rows_by_latent=rows, latent_pointers=starts), order

    def _knowing(self, **properties: Tensor) -> Pattern:
        """This pattern, with what its cached properties would compute."""
        self.__dict__.update(properties)
        return self


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

    @classmethod
    def side_by_side(cls, codes: Sequence[SparseCode]) -> SparseCode:
        """Codes of the same rows on different latents as one, numbered in that order; differentiable in the values."""
        if len(codes) == 1:
            return codes[0]
        firsts = [sum(code.num_latents for code in codes[:i]) for i in range(len(codes))]
        rows = torch.cat([code.row_ids for code in codes])
        latents = torch.cat([code.latents + first for code, first in zip(codes, firsts, strict=True)])
        order = rows.argsort(stable=True)
        values = torch.cat([code.values for code in codes])[order]
        size = (codes[0].num_rows, sum(code.num_latents for code in codes))
        return cls.from_pairs(rows[order], latents[order], values, size=size)

    @classmethod
    def from_pairs(
        cls, rows: Int[Tensor, "active"], latents: Int[Tensor, "active"], values: Tensor, *, size: tuple[int, int]
    ) -> SparseCode:
        """The code of pairs that are sorted by row, latents ascending within one; `size` is (rows, latents)."""
        return cls.of(Pattern.of_pairs(rows, latents, size=size), values)

    @classmethod
    def from_latent_order(
        cls, rows: Int[Tensor, "active"], latents: Int[Tensor, "active"], values: Tensor, *, size: tuple[int, int]
    ) -> SparseCode:
        """The code of pairs that are sorted by latent, rows ascending within one; `size` is (rows, latents)."""
        pattern, order = Pattern.of_latent_order(rows, latents, size=size)
        return cls.of(pattern, values[order])

    @classmethod
    def below_each_other(cls, codes: Sequence[SparseCode]) -> SparseCode:
        """Codes of different rows on the same latents as one, in that order."""
        if len(codes) == 1:
            return codes[0]
        firsts = [sum(code.num_rows for code in codes[:i]) for i in range(len(codes) + 1)]
        rows = torch.cat([code.row_ids + first for code, first in zip(codes, firsts, strict=False)])
        latents, values = torch.cat([code.latents for code in codes]), torch.cat([code.values for code in codes])
        return cls.from_pairs(rows, latents, values, size=(firsts[-1], codes[0].num_latents))

    def split(self, sizes: Sequence[int]) -> list[SparseCode]:
        """The parts on consecutive stretches of that many latents, each numbered from zero; undoes `side_by_side`."""
        if len(sizes) == 1:
            return [self]
        ends = torch.tensor(sizes, device=self.latents.device).cumsum(0)
        owner = torch.searchsorted(ends, self.latents, right=True)
        order = owner.argsort(stable=True)
        stops = torch.searchsorted(owner[order], torch.arange(len(sizes), device=owner.device), right=True)
        picked = order.tensor_split(stops[:-1].cpu())
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self._picked(own, first, size) for own, first, size in zip(picked, firsts, sizes, strict=True)]

    def active(self) -> SparseCode:
        """The pairs with a value above 0, where a training step holds others too; differentiable in the values."""
        pairs = (self.values > 0).nonzero().squeeze(1)
        return self if len(pairs) == self.num_active else self._picked(pairs, 0, self.num_latents)

    def detach(self) -> SparseCode:
        """The same code without its graph."""
        return SparseCode.of(self.pattern, self.values.detach())

    def _picked(self, pairs: Tensor, first: int, num_latents: int) -> SparseCode:
        rows, latents = self.row_ids[pairs], self.latents[pairs] - first
        return SparseCode.from_pairs(rows, latents, self.values[pairs], size=(self.num_rows, num_latents))


def pointers(row_ids: Int[Tensor, "active"], *, num_rows: int) -> Int[Tensor, "rows_plus_one"]:
    """Row pointers of sorted row ids: where each row starts, and the end."""
    edges = torch.arange(num_rows + 1, device=row_ids.device, dtype=row_ids.dtype)
    return torch.searchsorted(row_ids, edges)
