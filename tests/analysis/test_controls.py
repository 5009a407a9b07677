"""Controls: bands and counts beyond them."""

from __future__ import annotations

import pytest
import torch

from crosscoder.analysis.controls import Band, counts_beyond, null_band


def test_band_and_counts_by_hand() -> None:
    """Of 0, .001, ..., 1 the band leaves out one on each side; NaN (no decoder) never counts."""
    norms = torch.cat([torch.linspace(0, 1, 1001), torch.tensor([float("nan")])])
    band = null_band([norms])
    assert (band.low, band.high, band.num_latents) == (pytest.approx(0.001), pytest.approx(0.999), 1001)
    found = counts_beyond(Band(0.4, 0.6, 1), [torch.tensor([0.1, 0.5, 0.9, 0.95]), torch.tensor([0.5, 0.5, 0.7, 0.5])])
    assert (found.below.mean, found.above.mean) == (0.5, 1.5)
    assert found.expected == pytest.approx(0.004)
    assert 0 == found.below.low < found.below.mean < found.below.high and found.above.high <= 4


def test_a_difference_shows_beyond_the_band_of_a_null() -> None:
    """Counts of the null itself are what is expected; a pair with exclusive latents exceeds it with its interval."""
    generator = torch.Generator().manual_seed(0)
    null = [0.5 + 0.02 * torch.randn(4000, generator=generator) for _ in range(3)]
    band = null_band(null)
    itself = counts_beyond(band, null)
    assert itself.above.low <= itself.expected <= itself.above.high
    real = [torch.cat([norms[:3950], torch.full((50,), 0.8)]) for norms in null]
    assert counts_beyond(band, real).above.low > 30
