"""Signatures of where latents are active: who is active in the same rows or contexts, without comparing all of them.

    m_i^h = min over units u with f_i > 0 of hash_h(u)        P(m_i^h = m_j^h) = Jaccard(i, j)

so that the share of equal entries of two signatures estimates the Jaccard index, with standard error
`√(J (1 − J) / H)` over H hashes (Broder 1997, MinHash). Memory is latents × H numbers of 4 bytes, whatever the number
of rows; what is found is to be counted exactly in a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import Batch
from crosscoder.analysis.co_activation import Unit, in_units
from crosscoder.codes import SparseCode

_EMPTY = 2**31 - 1
_AT_ONCE = 2**23
_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64's, as int64


@dataclass(frozen=True)
class SimilarPairs:
    """Pairs of latents whose signatures agree, most similar first; `jaccard` is an estimate."""

    latents_a: Int[Tensor, "pairs"]
    latents_b: Int[Tensor, "pairs"]
    jaccard: Float[Tensor, "pairs"]


class FiringSignatures:
    """Running signatures of some latents; an observer of a pass."""

    def __init__(
        self,
        latents: Int[Tensor, "some"],
        *,
        num_latents: int,
        num_hashes: int = 128,
        unit: Unit = "row",
        seed: int = 0,
    ) -> None:
        self.unit: Unit = unit
        self.latents, self.num_units = latents.cpu().unique(), 0
        self._seed, self.num_hashes = seed, num_hashes
        self._slot = torch.full((num_latents,), -1)
        self._slot[self.latents] = torch.arange(len(self.latents))
        self._signature = torch.full((len(self.latents), num_hashes), _EMPTY, dtype=torch.int32)

    @torch.no_grad()
    def update(self, batch: Batch, code: SparseCode) -> None:
        """Add the units of one batch of whole contexts."""
        code = in_units(batch, code, self.unit)
        slot = self._slot[code.latents.cpu()]
        kept = (slot >= 0).nonzero().squeeze(1)
        kept = kept[slot[kept].argsort(stable=True)]
        hashes = _hashes(torch.arange(code.num_rows) + self.num_units, self.num_hashes, seed=self._seed).numpy()
        for some in kept.split(max(1, _AT_ONCE // self.num_hashes)):
            owners, number = slot[some].unique_consecutive(return_counts=True)
            starts = (number.cumsum(0) - number).numpy()
            least = np.minimum.reduceat(hashes[code.row_ids.cpu()[some].numpy()], starts, axis=0)
            self._signature[owners] = torch.minimum(self._signature[owners], torch.from_numpy(least))
        self.num_units += code.num_rows

    def similar(
        self, latents_a: Int[Tensor, "a"], latents_b: Int[Tensor, "b"], *, jaccard: float = 0.5
    ) -> SimilarPairs:
        """Pairs of one of each with an estimated Jaccard index of at least `jaccard`; never of a latent with itself."""
        a, b = self._signatures_of(latents_a), self._signatures_of(latents_b)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        step = max(1, _AT_ONCE // max(1, b.numel()))
        for first in range(0, len(a), step):
            block = a[first : first + step]
            share = _agreement(block, b)
            i, j = ((share >= jaccard) & (share > 0)).nonzero(as_tuple=True)
            found.append((i + first, j, share[i, j]))
        i, j = (torch.cat([torch.empty(0, dtype=torch.int64), *(hit[n] for hit in found)]) for n in (0, 1))
        value = torch.cat([torch.empty(0), *(hit[2] for hit in found)])
        left, right = latents_a.cpu()[i], latents_b.cpu()[j]
        order = value.argsort(descending=True, stable=True)
        order = order[left[order] != right[order]]
        return SimilarPairs(left[order], right[order], value[order])

    def _signatures_of(self, latents: Int[Tensor, "some"]) -> Int[Tensor, "some hashes"]:
        slot = self._slot[latents.cpu()]
        assert bool((slot >= 0).all()), "only latents that were watched have a signature"
        return self._signature[slot]


def _agreement(a: Int[Tensor, "a hashes"], b: Int[Tensor, "b hashes"]) -> Float[Tensor, "a b"]:
    """The share of equal entries; a latent that was never active agrees with none."""
    equal = torch.zeros(len(a), len(b))
    for left, right in zip(a.T, b.T, strict=True):
        equal += (left[:, None] == right) & (left[:, None] != _EMPTY)
    return equal / a.shape[1]


def _hashes(units: Int[Tensor, "some"], num_hashes: int, *, seed: int) -> Int[Tensor, "some hashes"]:
    """31 bits of splitmix64 for every unit and hash."""
    start = (torch.arange(num_hashes) + 1 + (seed + 1) * 1_000_003) * _GOLDEN
    z = _mixed(units[:, None] * _MIX_1 + start)
    return _shifted(z, 33).clamp(max=_EMPTY - 1).to(torch.int32)


def _mixed(z: Int[Tensor, "some hashes"]) -> Int[Tensor, "some hashes"]:
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Int[Tensor, "some hashes"], bits: int) -> Int[Tensor, "some hashes"]:
    """Shifted right with zeros coming in; torch's own shift keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
