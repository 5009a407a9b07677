"""Bands and counts: how many latents of a pair lie beyond what the latents of a null pair reach.

The band holds nearly all relative norms of crosscoders of a null pair (`capture.null_pair`), which come out of training
alone. Counts of the real pair are given beside the number that would lie beyond the band if there were no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from crosscoder.errors import TextError

NUM_DRAWS = 2000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Band:
    """The relative norms between two quantiles of null latents."""

    low: float
    high: float
    num_latents: int


@dataclass(frozen=True)
class Count:
    """A number of latents per crosscoder, mean over seeds, with an interval by resampling seeds and latents."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CountsBeyond:
    """Latents below and above a null's band; `expected` on each side were there no difference."""

    below: Count
    above: Count
    expected: float


def null_band(relative_norms: Sequence[Float[Tensor, "_"]], low: float = 0.001, high: float = 0.999) -> Band:
    """The band between quantiles of the relative norms of null crosscoders, pooled over seeds; NaN is left out."""
    pooled = np.concatenate([_finite(norms) for norms in relative_norms])
    if not len(pooled):
        raise TextError("expected relative norms of at least one live latent; got none.")
    bounds = np.quantile(pooled, [low, high])
    return Band(float(bounds[0]), float(bounds[1]), len(pooled))


def counts_beyond(
    band: Band, relative_norms: Sequence[Float[Tensor, "_"]], *, quantile: float = 0.001, seed: int = 0
) -> CountsBeyond:
    """How many latents lie below and above the band, one tensor of relative norms per seed; NaN is left out.

    The interval resamples seeds, and latents within each seed. `quantile` is what the band leaves out on each side.
    """
    finite = [_finite(norms) for norms in relative_norms]
    generator = np.random.Generator(np.random.Philox(seed))
    below = np.array([(norms < band.low).sum() for norms in finite])
    above = np.array([(norms > band.high).sum() for norms in finite])
    sizes = np.array([len(norms) for norms in finite])
    return CountsBeyond(
        below=_count(below, sizes, generator),
        above=_count(above, sizes, generator),
        expected=quantile * float(sizes.mean()),
    )


def _count(found: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> Count:
    """Resampling n latents of which c lie beyond gives Binomial(n, c / n) of them."""
    seeds = generator.integers(0, len(found), (NUM_DRAWS, len(found)))
    drawn = generator.binomial(sizes[seeds], (found / np.maximum(1, sizes))[seeds]).mean(1)
    low, high = np.quantile(drawn, INTERVAL)
    return Count(float(found.mean()), float(low), float(high))


def _finite(norms: Float[Tensor, "latents"]) -> np.ndarray:
    values = norms.detach().double().cpu().numpy()
    return values[np.isfinite(values)]
