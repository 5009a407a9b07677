"""The null pair: moments of the real difference, reproducible noise; the band and counts beyond it."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from crosscoder.analysis.controls import Band, NullPair, counts_beyond, fit_difference, null_band
from crosscoder.errors import SourceMismatch
from crosscoder.sources import Source, SourceSet

from .worlds import ListedActivations


def real_pair(num_rows: int = 20_000) -> ListedActivations:
    """Sources base, plain and chat: chat is base plus correlated noise with a mean."""
    sources = SourceSet([Source(name, "embed", 4) for name in ("base", "plain", "chat")])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 12, generator=generator)
    mixing = torch.randn(4, 4, generator=generator)
    x[:, 8:] = x[:, :4] + torch.randn(num_rows, 4, generator=generator) @ mixing + torch.tensor([1.0, -2, 3, 0.5])
    return ListedActivations(sources, x)


def test_streamed_moments_equal_those_of_the_whole() -> None:
    """Uneven batches and a large mean lose nothing."""
    x = torch.randn(501, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e4
    found = fit_difference(x.split([100, 1, 250, 150]))
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.factor @ found.factor.T, found.covariance, rtol=1e-4, atol=1e-4)


def test_the_null_has_the_moments_of_the_real_difference_and_none_of_its_rows() -> None:
    """x_a is untouched; x_b − x_a has the same mean and covariance, and is independent of the real one."""
    real = real_pair()
    null = NullPair(real, a="base", b="chat", num_rows=20_000)
    assert null.sources.keys == ("base/embed", "chat/embed")
    x = next(null.batches(20_000)).x
    torch.testing.assert_close(x[:, :4], real.x[:, :4])
    made, true = (x[:, 4:] - x[:, :4]).double(), (real.x[:, 8:] - real.x[:, :4]).double()
    scale = float(true.std())
    assert (made.mean(0) - true.mean(0)).abs().max() < 0.05 * scale
    assert (torch.cov(made.T) - torch.cov(true.T)).abs().max() < 0.06 * scale**2
    correlation = np.corrcoef(torch.cat([made, true], dim=1).T.numpy())[:4, 4:]
    assert np.abs(correlation).max() < 0.04


def test_noise_depends_on_the_row_alone() -> None:
    """Any batch size, and resuming from a state, give the same rows."""
    whole = next(NullPair(real_pair(6000), a="base", b="chat").batches(6000)).x
    null = NullPair(real_pair(6000), a="base", b="chat")
    parts = list(islice(null.batches(750), 8))
    torch.testing.assert_close(torch.cat([part.x for part in parts]), whole)
    resumed = NullPair(real_pair(6000), a="base", b="chat")
    resumed.load_state_dict({"source": {}, "rows_served": 1500, "seed": 0})
    torch.testing.assert_close(
        resumed.null_rows(resumed._source.x[1500:1600], first_row=resumed.state_dict()["rows_served"]), whole[1500:1600]
    )
    other = next(NullPair(real_pair(6000), a="base", b="chat", seed=1).batches(6000)).x
    assert not torch.allclose(other, whole)


def test_only_the_asked_for_rows_are_measured() -> None:
    """`num_rows` bounds the pass."""

    class Endless(ListedActivations):
        def contexts(self):
            yield from self.batches(100)

    real = real_pair(1000)
    assert NullPair(Endless(real.sources, real.x), a="base", b="chat", num_rows=950).difference.num_rows == 1000


def test_unequal_widths_are_refused() -> None:
    """There is no difference between spaces of different width."""
    sources = SourceSet([Source("base", "embed", 4), Source("chat", "embed", 5)])
    with pytest.raises(SourceMismatch, match="two sources of one width"):
        NullPair(ListedActivations(sources, torch.zeros(4, 9)), a="base", b="chat")


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
