"""Norm profiles by hand, against the decoder rows one latent at a time, and on a world whose spans are planted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from crosscoder.analysis.profiles import cosine_matrices, norm_profiles
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.nonlinearities import TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.synthetic import layer_world, plant
from crosscoder.wiring import LatentGroup, Wiring, acausal, sae, weakly_causal

from .worlds import random_crosscoder


def test_profiles_by_hand() -> None:
    """Norms 3:4 at right angles, 2:0, and nothing at all."""
    sources = SourceSet([Source("a", "embed", 2), Source("b", "embed", 2)])
    cc = Crosscoder(acausal(sources, num_latents=3), TopK(1), seed=None)
    with torch.no_grad():
        cc.weights[0].decoder.copy_(torch.tensor([[3.0, 0, 0, 4], [0, 2, 0, 0], [0, 0, 0, 0]]))
    found = norm_profiles(cc, cut=0.5)
    assert found.profile.tolist() == [[0.75, 1.0], [1.0, 0.0], [0.0, 0.0]]
    assert (found.peak.tolist(), found.span.tolist()) == ([1, 0, -1], [2, 1, 0])
    assert found.cosine_to_peak[0].tolist() == [0.0, 1.0]
    assert found.cosine_to_peak[1, 0] == 1 and found.cosine_to_peak[1, 1].isnan()
    assert found.mean_cosine.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert found.num_latents_both.tolist() == [[2, 1], [1, 1]]
    table = found.table().to_pylist()
    assert table[2]["peak"] is None and table[0]["peak"] == "b/embed"
    assert table[1]["cosine_to_peak/b/embed"] is None and table[0]["norm_normalised/a/embed"] == 3.0
    assert found.to_json()["num_latents_by_span"] == [1, 1, 1]


def test_norms_follow_the_space_and_cosines_do_not() -> None:
    """The scale of a source moves raw norms and with them the peak; angles stay, folded or not."""
    cc = random_crosscoder((6, 6)).double()
    cc.set_normaliser(torch.zeros(12), torch.tensor([0.01, 100.0]))
    normalised, raw = norm_profiles(cc), norm_profiles(cc, space="raw")
    assert set(raw.peak.tolist()) == {0} and set(normalised.peak.tolist()) == {0, 1}
    torch.testing.assert_close(raw.norms, cc.decoder_norms("raw").detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(raw.mean_cosine, normalised.mean_cosine, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm_profiles(cc.folded()).norms, normalised.norms, rtol=1e-12, atol=0)


def test_every_wiring_agrees_with_its_decoder_rows() -> None:
    """Groups that write different sources, one of them tied: latent by latent, by the definition."""
    keys = [f"m/layers.{n}.resid_post" for n in range(3)]
    sources = SourceSet([Source.parse(key, width=4) for key in keys])
    groups = [
        LatentGroup("all", 5, sources.keys, sources.keys),
        LatentGroup("late", 4, (keys[0],), tuple(keys[1:]), tied="decoder"),
        LatentGroup("one", 3, (keys[2],), (keys[2],)),
    ]
    cc = Crosscoder(Wiring(sources, groups), TopK(1), across_sources="independent").double()
    found = norm_profiles(cc)
    rows = torch.stack([cc.decoder_rows(key) for key in keys], dim=1).detach()
    for i in range(cc.num_latents):
        for s in range(3):
            own = cosine_similarity(rows[i, int(found.peak[i])], rows[i, s], dim=0)
            expected = own if cc.wiring.writes_mask[i, s] else torch.tensor(torch.nan).double()
            torch.testing.assert_close(found.cosine_to_peak[i, s], expected, equal_nan=True, rtol=1e-10, atol=1e-12)
    between = cosine_similarity(rows[:, 1], rows[:, 2], dim=1)[:9].mean()
    torch.testing.assert_close(found.mean_cosine[1, 2].double(), between, rtol=1e-6, atol=1e-7)
    assert found.num_latents_both.tolist() == [[5, 5, 5], [5, 9, 9], [5, 9, 12]]
    torch.testing.assert_close(cosine_matrices(cc, [11, 6])[1, 1, 2], torch.tensor(1.0).double())
    assert bool(cosine_matrices(cc, [11])[0, 0].isnan().all())


def test_unequal_widths_have_no_cosine_and_say_so() -> None:
    """A null, with its reason."""
    found = norm_profiles(random_crosscoder((6, 3)))
    assert bool(found.mean_cosine[0, 1].isnan()) and found.mean_cosine[0, 0] == pytest.approx(1)
    assert found.no_cosine == {("base/embed", "chat/embed"): "widths 6 and 3 differ"}
    assert found.to_json()["mean_cosine"][0][1] is None


def test_planted_spans_are_read_back() -> None:
    """A crosscoder that has the concepts of a layer world as its decoder has their spans and turns."""
    truth = plant(layer_world(5, num_concepts=20, width=32), seed=0)
    cc = Crosscoder(acausal(truth.sources, num_latents=truth.num_concepts), TopK(1), seed=None)
    with torch.no_grad():
        cc.weights[0].decoder.copy_(truth.packed)
    found = norm_profiles(cc)
    assert found.span.tolist() == (truth.span[:, 1] - truth.span[:, 0] + 1).tolist()
    near, far = found.mean_cosine[2, 3], found.mean_cosine[0, 4]
    assert near == pytest.approx(torch.deg2rad(torch.tensor(10.0)).cos().item(), abs=1e-3)
    assert far < near - 0.02


def test_what_no_latent_writes_together_is_named() -> None:
    """Autoencoders side by side have profiles of one source each."""
    sources = SourceSet([Source("m", f"layers.{n}.resid_post", 4) for n in range(2)])
    one, two = (sae(source, num_latents=3).prefixed(source.site.replace(".", "-")) for source in sources)
    cc = Crosscoder(Wiring(sources, [*one.over(sources), *two.over(sources)]), TopK(1))
    assert list(norm_profiles(cc).no_cosine.values()) == ["no latent writes both"]
    assert norm_profiles(Crosscoder(weakly_causal(sources, num_latents_per_layer=2), TopK(1))).no_cosine == {}


def test_one_source_and_latents_that_are_not_there_are_refused() -> None:
    """A profile needs two sources; a latent must exist."""
    with pytest.raises(SourceMismatch, match="two written sources"):
        norm_profiles(random_crosscoder((6,)))
    with pytest.raises(SourceMismatch, match="latents 0 to 19; got 20"):
        cosine_matrices(random_crosscoder(), [3, 20])
