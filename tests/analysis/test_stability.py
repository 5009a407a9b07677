"""Matches by decoder and by activation: permuted copies match perfectly, strangers do not; against numpy's corrcoef."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from crosscoder.analysis import latent_matches
from crosscoder.analysis.classes import CLASSES, latent_classes
from crosscoder.analysis.latent_matches import JointSums, decoder_matches
from crosscoder.analysis.stability import seed_stability
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.nonlinearities import ReLU

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows


def permuted(crosscoder: Crosscoder, order: torch.Tensor) -> Crosscoder:
    """The same crosscoder with its latents in another order: new latent n is the old `order[n]`."""
    copy = deepcopy(crosscoder)
    with torch.no_grad():
        for name in ("encoder", "decoder", "encoder_bias"):
            getattr(copy.weights[0], name).copy_(getattr(crosscoder.weights[0], name)[order])
    copy.refresh_gate()
    return copy


def a_crosscoder(num_latents: int = 40, seed: int = 0) -> Crosscoder:
    cc = random_crosscoder((24, 24), num_latents=num_latents, nonlinearity=ReLU(), seed=seed)
    with torch.no_grad():
        cc.weights[0].encoder_bias.fill_(-0.5)
    return cc


def test_a_permuted_copy_matches_itself() -> None:
    """Every latent comes back, with similarity 1, at the place that it went to; classes agree."""
    cc = a_crosscoder()
    with torch.no_grad():
        cc.weights[0].decoder[:5, 24:] = 0
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    other = permuted(cc, order)
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 240), regular_rows(num_contexts=12, length=21))
    classes = [latent_classes(one, a="base", b="chat") for one in (cc, other)]
    found = seed_stability(cc, [other], activations=activations, classes=classes)
    assert bool(found.live.all())
    for match in (*found.by_decoder, *found.by_activation):
        assert match.best.tolist() == order.argsort().tolist() and bool(match.mutual.all())
        torch.testing.assert_close(match.similarity.float(), torch.ones(40))
    assert found.shares() == found.shares("activation") == [1.0]
    agreement = found.agreement("activation")
    counts = torch.tensor([classes[0].counts[name] for name in CLASSES])
    assert agreement[:, :-1].diagonal().tolist() == counts.tolist() and int(agreement.sum()) == 40 and counts[0] == 5
    assert found.to_json()["by_decoder"]["share_per_seed_by_class"]["a-only"] == [1.0]
    assert set(found.table()["num_seeds_by_activation"].to_pylist()) == {1}


def test_strangers_do_not_match() -> None:
    """Another seed shares no latent; half a copy shares half; the larger of two seeds counts."""
    cc, stranger = a_crosscoder(seed=0), a_crosscoder(seed=1)
    half = deepcopy(stranger)
    with torch.no_grad():
        half.weights[0].decoder[:20] = cc.weights[0].decoder[20:]
    found = seed_stability(cc, [stranger, half])
    assert found.shares() == [0.0, 0.5]
    assert found.num_seeds().tolist() == [0] * 20 + [1] * 20
    torch.testing.assert_close(found.largest()[20:], torch.ones(20))
    assert found.by_activation == () and "by_activation" not in found.to_json()


def test_a_match_that_is_not_mutual_does_not_count() -> None:
    """Two latents near one: only the nearer comes back."""
    cc, other = a_crosscoder(num_latents=8), a_crosscoder(num_latents=8, seed=1)
    with torch.no_grad():
        other.weights[0].decoder[3] = cc.weights[0].decoder[0]
        cc.weights[0].decoder[1] = cc.weights[0].decoder[0] + 0.02 * cc.weights[0].decoder[2]
    found = decoder_matches(cc, other)
    assert found.best[:2].tolist() == [3, 3] and found.mutual[:2].tolist() == [True, False]
    assert found.similarity[1] > 0.9 and found.share_above(0.9) == 1 / 8


@pytest.mark.parametrize("at_once", [7, 2**20])
def test_correlations_equal_numpys(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch or in many, in any chunks, for all latents or for some."""
    monkeypatch.setattr(latent_matches, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    f, g = (torch.relu(torch.randn(150, n, generator=generator).double() - 0.5) for n in (5, 7))
    f[:, 2] = 0
    wanted = np.corrcoef(f.numpy()[:, [0, 3, 4]].T, g.numpy().T)[:3, 3:]
    sums = JointSums((5, 7), torch.tensor([4, 0, 3]))
    for part in range(4):
        sums.update(*(SparseCode.from_dense(code.tensor_split(4)[part]) for code in (f, g)))
    np.testing.assert_allclose(sums.correlation.numpy(), wanted, rtol=1e-9, atol=1e-12)
    whole = JointSums((5, 7))
    whole.update(SparseCode.from_dense(f), SparseCode.from_dense(g))
    matches = whole.matches()
    assert matches.best[[0, 3, 4]].tolist() == wanted.argmax(1).tolist()
    assert matches.best[2] == -1 and matches.similarity[2].isnan() and not matches.mutual[2]
    assert matches.table()["best"].to_pylist()[2] is None


def test_a_block_at_a_time_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder matches do not depend on the block."""
    cc, other = a_crosscoder(), a_crosscoder(seed=1)
    whole = decoder_matches(cc, other)
    monkeypatch.setattr(latent_matches, "_BLOCK", 7)
    parts = decoder_matches(cc, other)
    assert whole.best.tolist() == parts.best.tolist() and whole.mutual.tolist() == parts.mutual.tolist()


def test_dead_latents_count_nowhere() -> None:
    """Dead on these rows, or dead by their class."""
    cc = a_crosscoder()
    with torch.no_grad():
        cc.weights[0].encoder_bias[:10] = -1e6
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 240))
    found = seed_stability(cc, [deepcopy(cc)], activations=activations)
    assert int(found.live.sum()) == 30 and found.shares() == [1.0]
    assert bool(found.largest()[:10].isnan().all()) and found.num_seeds()[:10].tolist() == [0] * 10
    density = (torch.arange(40) >= 4).double()
    classes = [latent_classes(cc, a="base", b="chat", density=density)] * 2
    known = seed_stability(cc, [deepcopy(cc)], classes=classes)
    assert int(known.live.sum()) == 36 and int(known.agreement().sum()) == 36


def test_what_cannot_be_matched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sources, no others, classes for some, and too large a matrix."""
    cc = a_crosscoder()
    with pytest.raises(SourceMismatch, match="same sources"):
        seed_stability(cc, [random_crosscoder((24, 6))])
    with pytest.raises(ConfigError, match="got 0 and 0"):
        seed_stability(cc, [])
    with pytest.raises(ConfigError, match="got 1 and 1"):
        seed_stability(cc, [cc], classes=[latent_classes(cc, a="base", b="chat")])
    monkeypatch.setattr(latent_matches, "MAX_PAIRS", 100)
    with pytest.raises(ConfigError, match="at most 2 here"):
        JointSums((40, 40))
