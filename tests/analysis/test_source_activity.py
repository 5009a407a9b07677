"""Source activity by hand, against zeroing a source and encoding again, and on latents that read one source alone."""

from __future__ import annotations

import pytest
import torch

from crosscoder.analysis.source_activity import source_activity
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, JumpReLU, Nonlinearity, ReLU, TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import LatentGroup, Wiring, acausal

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows


def test_activity_by_hand() -> None:
    """f = 3 from a and 1 from b on one row, 2 and −1 on the other; a third latent never fires."""
    sources = SourceSet([Source("a", "embed", 1), Source("b", "embed", 1)])
    cc = Crosscoder(acausal(sources, num_latents=2), ReLU(), seed=None)
    with torch.no_grad():
        cc.weights[0].encoder.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        cc.weights[0].decoder.fill_(1.0)
    found = source_activity(cc, ListedActivations(sources, torch.tensor([[3.0, 1.0], [2.0, -1.0], [-1.0, 0.0]])))
    # a: |4 − 1| + |1 − 0| of 5; b: |4 − 3| + |1 − 2| of 5
    assert found.activity[0].tolist() == [pytest.approx(0.8), pytest.approx(0.4)]
    assert found.contribution[0].tolist() == [2.5, 0.0]
    assert found.share[0].tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert found.coherence[0] == pytest.approx(1.5) and found.coherence[1].isnan()
    assert found.strongest.tolist() == [0, -1]
    assert found.drives().tolist() == [[True, True], [False, False]]
    assert found.drives(0.51).tolist() == [[True, False], [False, False]]
    rows = found.table().to_pylist()
    assert rows[1]["activity/a/embed"] is None and rows[1]["strongest"] is None and rows[0]["num_driving"] == 2
    assert found.to_json()["num_latents_by_driving_sources"] == [0, 0, 1]


@pytest.mark.parametrize("kind", [ReLU(), TopK(4), BatchTopK(4), JumpReLU()])
@pytest.mark.parametrize("folded", [False, True])
def test_it_is_what_zeroing_a_source_gives(kind: Nonlinearity, folded: bool) -> None:
    """Pre-activations of rows whose source is set to its raw mean; unequal widths, means and scales."""
    cc = random_crosscoder((5, 3), nonlinearity=kind).double()
    x = random_rows(cc.sources, 200).double()
    found = source_activity(cc.folded() if folded else cc, ListedActivations(cc.sources, x))
    f = cc.encode(x).to_dense().detach()
    active = f > 0
    seen = active.any(0)
    encoder, bias = cc.weights[0].encoder.detach(), cc.weights[0].encoder_bias.detach()
    for s, key in enumerate(cc.sources.keys):
        without = x.clone()
        without[:, cc.sources.slices[key]] = cc.mean[cc.sources.slices[key]]
        value = torch.relu(cc.normalise(without) @ encoder.T + bias)
        change = ((f - value).abs() * active).sum(0) / f.sum(0)
        torch.testing.assert_close(found.activity[seen, s], change[seen], rtol=1e-9, atol=1e-12)
    assert found.num_active.tolist() == active.sum(0).tolist()
    whole = found.contribution.sum(1) + bias
    torch.testing.assert_close(whole[seen], found.mean_value[seen], rtol=1e-9, atol=1e-12)


def test_a_latent_that_reads_one_source_has_all_its_activity_there() -> None:
    """By its encoder or by its wiring; null where the wiring reads nothing."""
    sources = SourceSet([Source(name, "embed", 4) for name in "abc"])
    groups = [
        LatentGroup("all", 6, sources.keys, sources.keys),
        LatentGroup("of-b", 5, (sources.keys[1],), sources.keys),
        LatentGroup("of-ac", 5, (sources.keys[0], sources.keys[2]), sources.keys),
    ]
    cc = Crosscoder(Wiring(sources, groups), ReLU())
    with torch.no_grad():
        cc.weights[0].encoder[:3, 4:] = 0
    found = source_activity(cc, ListedActivations(sources, random_rows(sources, 100)))
    assert bool((found.num_active > 0).all())
    torch.testing.assert_close(found.share[:3, 0], torch.ones(3).double())
    torch.testing.assert_close(found.coherence[:3], torch.ones(3).double())
    assert found.share[6:11, 1].tolist() == [1.0] * 5 and bool(found.share[6:11, [0, 2]].isnan().all())
    assert bool(found.activity[11:, 1].isnan().all()) and not found.activity[11:, [0, 2]].isnan().any()
    assert bool((found.coherence[3:6] > 1.2).all()) and bool((found.coherence <= 3).all())


def test_equal_sources_share_alike() -> None:
    """With the same encoder on the same activations every source has the same share, and all of them drive."""
    sources = SourceSet([Source(name, "embed", 4) for name in "abc"])
    cc = Crosscoder(acausal(sources, num_latents=8), ReLU())
    with torch.no_grad():
        cc.weights[0].encoder.copy_(cc.weights[0].encoder[:, :4].repeat(1, 3))
    x = random_rows(SourceSet([sources.sources[0]]), 50).repeat(1, 3)
    found = source_activity(cc, ListedActivations(sources, x))
    torch.testing.assert_close(found.share, torch.full((8, 3), 1 / 3).double())
    torch.testing.assert_close(found.coherence, torch.full((8,), 3.0).double())


def test_batches_add_up() -> None:
    """Rows in one batch or in many give the same, and the mode found is restored."""
    cc = random_crosscoder().double()
    rows = regular_rows(num_contexts=9, length=8)
    x = random_rows(cc.sources, len(rows.context)).double()
    cc.train()
    one, many = (source_activity(cc, ListedActivations(cc.sources, x, places)) for places in (None, rows))
    torch.testing.assert_close(one.activity, many.activity, equal_nan=True)
    assert cc.training
