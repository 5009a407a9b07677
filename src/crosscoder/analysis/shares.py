"""Shares of a total with upper bounds: what a count in some seeds allows for in others.

With m of n found, the upper bound of the true share at a confidence c (Clopper and Pearson, one-sided) is

    p with P(Binomial(n, p) <= m) = 1 − c

It takes latents for independent draws, which those of one crosscoder are not. Over S seeds with shares s_i it is, by
Student's t, `mean(s) + t_c(S − 1) sd(s) / √S`, which takes only seeds for independent. `share_of` gives the larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CONFIDENCE = 0.95
_GRID = 200_001


@dataclass(frozen=True)
class Share:
    """`num_found` of `num_latents` over some seeds; `upper` is the larger of the bounds by latents and by seeds.

    `upper_by_seeds` is None for a single seed: how much seeds differ is then not known.
    """

    num_found: int
    num_latents: int
    share: float
    upper: float
    upper_by_latents: float
    upper_by_seeds: float | None
    confidence: float


def share_of(found: Sequence[int], latents: Sequence[int], *, confidence: float = CONFIDENCE) -> Share:
    """The share over all seeds, from what was found in each and of how many."""
    num_found, num_latents = sum(found), sum(latents)
    by_latents = binomial_upper(num_found, num_latents, confidence=confidence)
    each = [number / total for number, total in zip(found, latents, strict=True) if total]
    by_seeds = seeds_upper(each, confidence=confidence) if len(each) > 1 else None
    return Share(
        num_found=num_found,
        num_latents=num_latents,
        share=num_found / max(1, num_latents),
        upper=max(by_latents, by_seeds or 0.0),
        upper_by_latents=by_latents,
        upper_by_seeds=by_seeds,
        confidence=confidence,
    )


def binomial_upper(found: int, total: int, *, confidence: float = CONFIDENCE) -> float:
    """The largest share under which `found` of `total` or fewer still have the chance 1 − confidence."""
    if found >= total:
        return 1.0
    low, high = found / total, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(found, total, middle) > 1 - confidence else (low, middle)
    return high


def most_allowed(total: int, share: float, *, confidence: float = CONFIDENCE) -> int | None:
    """The largest number of `total` whose upper bound is within `share`; None where even zero has a larger one."""
    chance = 1 - confidence  # a bound is within the share where so few have at most this chance under it
    if total == 0 or _at_most(0, total, share) > chance:
        return None
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _at_most(middle, total, share) <= chance else (low, middle)
    return low


def seeds_upper(shares: Sequence[float], *, confidence: float = CONFIDENCE) -> float:
    """Student's upper bound of the mean over seeds, 1 at most."""
    spread = float(np.std(shares, ddof=1)) / math.sqrt(len(shares))
    return min(1.0, float(np.mean(shares)) + student_quantile(confidence, len(shares) - 1) * spread)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t: with `t = √ν tan θ` its density is `cos^(ν − 1) θ`, which a fine grid integrates."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, _GRID)
    density = np.cos(angle).clip(min=0) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(probability, mass / mass[-1], angle)))


def _at_most(found: int, total: int, share: float) -> float:
    """P(Binomial(total, share) <= found)."""
    if share >= 1:
        return 0.0
    k = torch.arange(found + 1, dtype=torch.float64)
    n = torch.tensor(float(total), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    logs = ways + k * math.log(max(share, 1e-300)) + (n - k) * math.log1p(-share)
    return float(logs.logsumexp(0).exp())
