"""Null pairs: moments of the real difference, reproducible noise, copies; runs on them that stop and go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosscoder.activations import Batch
from crosscoder.capture.null_pair import Difference, IdenticalPair, NullPair, fit_difference
from crosscoder.errors import FileFormatError, SourceMismatch, UnknownSource
from crosscoder.sources import Source, SourceSet


class Listed:
    """An ActivationSource of rows at hand, in their order; its place is the number of rows served."""

    def __init__(self, sources: SourceSet, x: torch.Tensor) -> None:
        self.sources, self.x, self.served = sources, x, 0

    def batches(self, batch_size: int) -> Iterator[Batch]:
        while True:
            first = self.served % len(self.x)
            part = self.x[first : first + batch_size]
            self.served += len(part)
            yield Batch(part)

    def contexts(self) -> Iterator[Batch]:
        return map(Batch, self.x.split(100))

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def real_pair(num_rows: int = 20_000) -> Listed:
    """Sources base, plain and chat: chat is base plus correlated noise with a mean."""
    sources = SourceSet([Source(name, "embed", 4) for name in ("base", "plain", "chat")])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 12, generator=generator)
    mixing = torch.randn(4, 4, generator=generator)
    x[:, 8:] = x[:, :4] + torch.randn(num_rows, 4, generator=generator) @ mixing + torch.tensor([1.0, -2, 3, 0.5])
    return Listed(sources, x)


def test_streamed_moments_equal_those_of_the_whole() -> None:
    """Uneven batches and a large mean lose nothing."""
    x = torch.randn(501, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e4
    found = fit_difference(x.split([100, 1, 250, 150]))
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.factor @ found.factor.T, found.covariance, rtol=1e-4, atol=1e-4)


def test_a_difference_is_kept_exactly(tmp_path: Path) -> None:
    """What is written is what is read; another file is refused."""
    found = fit_difference([torch.randn(50, 3, generator=torch.Generator().manual_seed(1))])
    found.save(tmp_path / "difference.safetensors")
    again = Difference.load(tmp_path / "difference.safetensors")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.covariance, found.covariance)
    assert again.num_rows == 50
    with pytest.raises(FileFormatError, match="there is none"):
        Difference.load(tmp_path / "nowhere.safetensors")


def test_the_null_has_the_moments_of_the_real_difference_and_none_of_its_rows() -> None:
    """Other sources are untouched; x_b − x_a has the same mean and covariance, and is independent of the real one."""
    real = real_pair()
    null = NullPair(real, a="base", b="chat", num_rows=20_000)
    assert null.sources == real.sources
    x = next(null.batches(20_000)).x
    assert torch.equal(x[:, :8], real.x[:, :8])
    made, true = (x[:, 8:] - x[:, :4]).double(), (real.x[:, 8:] - real.x[:, :4]).double()
    scale = float(true.std())
    assert (made.mean(0) - true.mean(0)).abs().max() < 0.05 * scale
    assert (torch.cov(made.T) - torch.cov(true.T)).abs().max() < 0.06 * scale**2
    correlation = np.corrcoef(torch.cat([made, true], dim=1).T.numpy())[:4, 4:]
    assert np.abs(correlation).max() < 0.04


def test_noise_depends_on_the_row_alone() -> None:
    """Any batch size, and resuming from a state, give the same rows; another seed gives others."""
    whole = next(NullPair(real_pair(6000), a="base", b="chat").batches(6000)).x
    null = NullPair(real_pair(6000), a="base", b="chat")
    torch.testing.assert_close(torch.cat([part.x for part in islice(null.batches(750), 8)]), whole)
    stopped = NullPair(real_pair(6000), a="base", b="chat")
    for _ in islice(stopped.batches(500), 3):
        pass
    resumed = NullPair(real_pair(6000), a="base", b="chat")
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    torch.testing.assert_close(next(resumed.batches(100)).x, whole[1500:1600])
    other = next(NullPair(real_pair(6000), a="base", b="chat", seed=1).batches(6000)).x
    assert not torch.allclose(other[:, 8:], whole[:, 8:])


def test_contexts_are_the_same_every_time_and_not_the_training_noise() -> None:
    """An analysis set of a null pair is one set of rows."""
    null = NullPair(real_pair(500), a="base", b="chat")
    once, again = (torch.cat([batch.x for batch in null.contexts()]) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.allclose(once[:, 8:], next(null.batches(500)).x[:, 8:])


def test_a_copy_is_a_copy() -> None:
    """x_b is x_a in batches and contexts; the rest is kept, and the source's rows are not written to."""
    real = real_pair(300)
    before = real.x.clone()
    pair = IdenticalPair(real, a="base", b="chat")
    for batch in [next(pair.batches(300)), *pair.contexts()]:
        assert torch.equal(batch.x[:, 8:], batch.x[:, :4])
    assert torch.equal(real.x, before)
    pair.load_state_dict({"served": 100})
    assert pair.state_dict() == {"served": 100}
    assert torch.equal(next(pair.batches(10)).x[:, :8], real.x[100:110, :8])


def test_only_the_asked_for_rows_are_measured() -> None:
    """`num_rows` bounds the pass: whole batches, up to it or more."""
    assert NullPair(real_pair(2000), a="base", b="chat", num_rows=950).difference.num_rows == 1000


def test_pairs_that_cannot_be_are_refused() -> None:
    """There is no difference between spaces of different width, nor from a source to itself or to none."""
    sources = SourceSet([Source("base", "embed", 4), Source("chat", "embed", 5)])
    with pytest.raises(SourceMismatch, match="two sources of one width"):
        NullPair(Listed(sources, torch.zeros(4, 9)), a="base", b="chat")
    with pytest.raises(SourceMismatch, match="two sources of one width"):
        IdenticalPair(real_pair(10), a="base", b="base")
    with pytest.raises(UnknownSource):
        IdenticalPair(real_pair(10), a="base", b="chatt")
