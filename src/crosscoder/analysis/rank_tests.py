"""Rank tests of all latents at once, with labels dealt by lot; intervals of an AUROC and of a difference of shares.

Among N prompts let latent i be active in m_i. The n_0 others share the rank (n_0 + 1)/2; c_ip = rank_ip − (n_0 + 1)/2
is 0 for them, so that only active prompts are touched. Its mean is c̄_i = m_i / 2. With n_A labels A and n_B labels B

    U_i − ½ n_A n_B = Σ_{p in A} c_ip − n_A c̄_i
    Var_i           = n_A n_B / (N (N − 1)) Σ_p (c_ip − c̄_i)²
    z_i             = (U_i − ½ n_A n_B) / √Var_i, 0 where Var_i is

Var is that over all ways to deal out the labels, exact whatever the ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.codes import SparseCode

NORMAL_BEYOND = 10
"""Deals that have to reach a value for their share to be its p."""
_Z95 = 1.959963984540054
_AT_ONCE = 128
_BISECTIONS = 60
_EQUAL = 1e-9


@dataclass(frozen=True)
class CentredRanks:
    """c_ip of some latents (sparse, latents × prompts), their means, and Σ_p (c_ip − c̄_i)²."""

    centred: Tensor
    mean: Float[Tensor, "latents"]
    spread: Float[Tensor, "latents"]

    @classmethod
    def of(cls, values: SparseCode, latents: Int[Tensor, "tested"]) -> CentredRanks:
        """The ranks of `latents` by their values; rows of `values` are prompts."""
        place = torch.full((values.num_latents,), -1)
        place[latents] = torch.arange(len(latents))
        chosen = place[values.latents] >= 0
        row, prompt = place[values.latents[chosen]], values.row_ids[chosen]
        count = torch.bincount(row, minlength=len(latents))
        centred = _ranks_among_active(row, values.values[chosen]) + (values.num_rows - count[row]).double() / 2
        size = (len(latents), values.num_rows)
        matrix = torch.sparse_coo_tensor(torch.stack([row, prompt]), centred, size, check_invariants=False)
        mean = count.double() / 2
        squares = torch.zeros(len(latents), dtype=torch.float64).index_add(0, row, centred.square())
        return cls(matrix.coalesce(), mean, squares - values.num_rows * mean.square())

    @property
    def num_prompts(self) -> int:
        """N."""
        return self.centred.shape[1]

    def above_expected(self, from_a: Bool[Tensor, "prompts deals"]) -> Float[Tensor, "tested deals"]:
        """`U − ½ n_A n_B` for every deal of labels."""
        labels = from_a.double()
        return torch.sparse.mm(self.centred, labels) - self.mean[:, None] * labels.sum(0)

    def z(self, from_a: Bool[Tensor, "prompts deals"]) -> Float[Tensor, "tested deals"]:
        """z for every deal; all have the same numbers of labels."""
        num_a, num = int(from_a[:, 0].sum()), self.num_prompts
        deviation = (num_a * (num - num_a) / (num * (num - 1)) * self.spread).clamp(min=0).sqrt()[:, None]
        return torch.where(deviation > _EQUAL, self.above_expected(from_a) / deviation.clamp(min=_EQUAL), 0.0)


@dataclass(frozen=True)
class Deals:
    """Labels dealt by lot, `num` times, the same whenever they are asked for."""

    from_a: Bool[Tensor, "prompts"]
    num: int
    seed: int

    def total(self, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all deals of `statistic(labels (prompts, some))`, which sums over those it gets."""
        generator = torch.Generator().manual_seed(self.seed)
        parts = [statistic(self._dealt(min(_AT_ONCE, self.num - i), generator)) for i in range(0, self.num, _AT_ONCE)]
        return torch.stack(parts).sum(0)

    def _dealt(self, count: int, generator: torch.Generator) -> Bool[Tensor, "prompts deals"]:
        orders = [torch.randperm(len(self.from_a), generator=generator) for _ in range(count)]
        return torch.stack([self.from_a[order] for order in orders], dim=1)


def p_values(ranks: CentredRanks, deals: Deals) -> tuple[Float[Tensor, "tested"], Float[Tensor, "tested"]]:
    """Two-sided p of every latent, and p of any latent reaching its |z| (family-wise).

    The share of deals that reach |z|, where at least ten do; beyond, the normal distribution's.
    """
    z = ranks.z(deals.from_a[:, None]).squeeze(1).abs()
    if not len(z):
        return z, z
    reached = z - _EQUAL

    def exceeding(labels: Tensor) -> Tensor:
        dealt = ranks.z(labels).abs()
        largest = dealt.max(0).values
        return torch.stack([(dealt >= reached[:, None]).sum(1), (largest >= reached[:, None]).sum(1)])

    alone, any_latent = deals.total(exceeding).double()
    counted = (1 + alone) / (1 + deals.num)
    normal = torch.special.erfc(z / 2**0.5)
    return torch.where(alone >= NORMAL_BEYOND, counted, normal), (1 + any_latent) / (1 + deals.num)


def mean_reaching(ranks: CentredRanks, deals: Deals, least: float) -> float:
    """How many latents have `|z| >= least` in a deal, on average."""
    return float(deals.total(lambda labels: (ranks.z(labels).abs() >= least - _EQUAL).sum())) / deals.num


def benjamini_hochberg(p: Float[Tensor, "tests"]) -> Float[Tensor, "tests"]:
    """q: the smallest false discovery rate at which each test is among the discoveries."""
    order = p.argsort(descending=True)
    rank = torch.arange(len(p), 0, -1, dtype=p.dtype)
    q = (p[order] * len(p) / rank).cummin(0).values if len(p) else p
    return torch.empty_like(p).index_copy(0, order, q.clamp(max=1.0))


def auroc_interval(
    auroc: Float[Tensor, "tests"], num_a: int, num_b: int
) -> tuple[Float[Tensor, "tests"], Float[Tensor, "tests"]]:
    """95 % interval of an AUROC (Newcombe 2006, method 5): all θ with |AUROC − θ| <= 1.96 √V(θ).

    `V(θ) = θ (1 − θ) (2M − 1 − (3M − 3) / ((2 − θ)(1 + θ))) / (n_A n_B)`, M = (n_A + n_B) / 2: the variance of Hanley &
    McNeil 1982 with M for both sizes. Unlike the bootstrap's it has a width where the AUROC is 0 or 1.
    """
    middle = (num_a + num_b) / 2

    def within(theta: Tensor) -> Tensor:
        factor = 2 * middle - 1 - (3 * middle - 3) / ((2 - theta) * (1 + theta))
        return (auroc - theta).abs() <= _Z95 * (theta * (1 - theta) * factor / (num_a * num_b)).sqrt()

    return _edge(auroc, torch.zeros_like(auroc), within), _edge(auroc, torch.ones_like(auroc), within)


def difference_interval(
    share_a: Float[Tensor, "tests"], share_b: Float[Tensor, "tests"], *, num_a: int, num_b: int
) -> tuple[Float[Tensor, "tests"], Float[Tensor, "tests"]]:
    """95 % interval of `share_a − share_b` from Wilson's of both shares (Newcombe 1998, method 10)."""
    (low_a, high_a), (low_b, high_b) = _wilson(share_a, num_a), _wilson(share_b, num_b)
    down = ((share_a - low_a).square() + (high_b - share_b).square()).sqrt()
    up = ((high_a - share_a).square() + (share_b - low_b).square()).sqrt()
    return share_a - share_b - down, share_a - share_b + up


def _wilson(share: Tensor, num: int) -> tuple[Tensor, Tensor]:
    centre = share + _Z95**2 / (2 * num)
    width = _Z95 * (share * (1 - share) / num + _Z95**2 / (4 * num**2)).sqrt()
    return (centre - width) / (1 + _Z95**2 / num), (centre + width) / (1 + _Z95**2 / num)


def _edge(inside: Tensor, outside: Tensor, within: Callable[[Tensor], Tensor]) -> Tensor:
    """Where `within` ends between a point at which it holds and one at the end of the scale, by bisection."""
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        holds = within(middle)
        inside, outside = torch.where(holds, middle, inside), torch.where(holds, outside, middle)
    return inside


def _ranks_among_active(row: Int[Tensor, "active"], values: Float[Tensor, "active"]) -> Float[Tensor, "active"]:
    """Every value's rank among those of its row, from 1 on and the middle one in ties, less ½: `c − n_0 / 2`."""
    i, v = row.numpy(), values.double().numpy()
    order = np.lexsort((v, i))
    i, v = i[order], v[order]
    place = np.arange(len(i), dtype=np.float64)
    tie = np.cumsum(np.append(True, (i[1:] != i[:-1]) | (v[1:] != v[:-1]))[: len(i)]) - 1
    middle = np.bincount(tie, weights=place) / np.bincount(tie)
    first = np.searchsorted(i, i)
    ranks = np.empty(len(i))
    ranks[order] = middle[tie] - first + 0.5
    return torch.from_numpy(ranks)
