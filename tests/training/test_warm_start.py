"""Warm start: exact conversion between normalisers, de-duplication, places in wirings, what has no match."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch, UnknownSource, WiringError
from crosscoder.nonlinearities import BatchTopK, ReLU, TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.training.warm_start import warm_start
from crosscoder.wiring import LatentGroup, Wiring, acausal, sae, weakly_causal

WIDTH = 6
LAYERS = SourceSet(Source("base", f"layers.{layer}.resid_post", WIDTH) for layer in range(3))
A, B, C = LAYERS.keys
PAIR = SourceSet([LAYERS[A], LAYERS[B]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crosscoder(wiring: Wiring, kind: ReLU | TopK | BatchTopK | None = None, *, seed: int = 1) -> Crosscoder:
    cc = Crosscoder(wiring, kind or ReLU(), seed=seed).double()
    g = generator(seed)
    cc.set_normaliser(
        torch.randn(wiring.sources.width, generator=g).double(),
        0.5 + torch.rand(len(wiring.sources), generator=g).double(),
    )
    return cc


def dictionary(
    source: Source, num_latents: int = 5, *, seed: int, kind: ReLU | TopK | BatchTopK | None = None
) -> Crosscoder:
    """An SAE with random weights, biases and normaliser: everything that a conversion can get wrong."""
    one = crosscoder(sae(source, num_latents=num_latents), kind, seed=seed)
    g = generator(seed + 100)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g).double())
    one.refresh_gate()
    return one


def like(other: Crosscoder, source: Source, order: list[int], *, noise: float = 0.0, seed: int = 50) -> Crosscoder:
    """An SAE of another source whose latent n is latent `order[n]` of `other`, its decoder a little turned."""
    twin = dictionary(source, len(order), seed=seed, kind=other.nonlinearity)
    g = generator(seed)
    with torch.no_grad():
        mine, theirs = twin.weights[0], other.weights[0]
        mine.encoder.copy_(theirs.encoder[order])
        mine.encoder_bias.copy_(theirs.encoder_bias[order])
        turned = theirs.decoder[order] + noise * torch.randn(len(order), WIDTH, generator=g).double()
        mine.decoder.copy_(turned)
        twin.bias.copy_(other.bias)
        twin.mean.copy_(other.mean)
        twin.scale.copy_(other.scale)
    twin.refresh_gate()
    return twin


def values(cc: Crosscoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        return cc.encode(x).to_dense()


@pytest.mark.parametrize("kind", [ReLU(), TopK(2)], ids=["relu", "topk"])
@pytest.mark.parametrize("folded", [False, True], ids=["normaliser apart", "folded"])
def test_one_source_takes_over_codes_and_reconstruction_from_any_normaliser(kind: ReLU | TopK, folded: bool) -> None:
    one = dictionary(LAYERS[A], seed=3, kind=kind)
    cc = crosscoder(sae(LAYERS[A], num_latents=5), kind)
    assert not torch.allclose(cc.mean, one.mean) and not torch.allclose(cc.scale, one.scale)
    found = warm_start(cc, {A: one.folded() if folded else one})
    x = 2 * torch.randn(200, WIDTH, generator=generator(0)).double()
    torch.testing.assert_close(values(cc, x), values(one, x))
    torch.testing.assert_close(cc(x), one(x))
    assert (found.taken, found.merged, found.left_out, found.as_drawn) == ((5,), (0,), (0,), 0)


def test_similar_latents_become_one_whose_pre_activation_is_the_mean_of_theirs() -> None:
    a = dictionary(LAYERS[A], seed=3)
    order = [2, 0, 4, 1, 3]
    b = like(a, LAYERS[B], order, noise=0.02)
    cc = crosscoder(acausal(PAIR, num_latents=8))
    drawn = {name: parameter.clone() for name, parameter in cc.weights[0].named_parameters()}
    found = warm_start(cc, {A: a, B: b})
    assert (found.taken, found.merged, found.as_drawn) == ((5, 0), (0, 5), 3)
    assert [order[latent] for latent in found.origin[:5, 1].tolist()] == found.origin[:5, 0].tolist()
    x = torch.randn(100, 2 * WIDTH, generator=generator(0)).double()
    pre = [one.normalise(x[:, columns]) @ one.weights[0].encoder.T + one.weights[0].encoder_bias
           for one, columns in ((a, slice(0, WIDTH)), (b, slice(WIDTH, None)))]  # fmt: skip
    mean = (pre[0][:, found.origin[:5, 0]] + pre[1][:, found.origin[:5, 1]]) / 2
    torch.testing.assert_close(values(cc, x)[:, :5], mean.relu())
    for key, one, column in ((A, a, 0), (B, b, 1)):
        raw = cc.decoder_rows(key, "raw")[:5]
        torch.testing.assert_close(raw, one.decoder_rows(key, "raw")[found.origin[:5, column]])
    for name, parameter in cc.weights[0].named_parameters():
        assert torch.equal(parameter[5:], drawn[name][5:]), name


def test_the_nearest_earlier_member_decides_and_each_side_joins_once() -> None:
    a = dictionary(LAYERS[A], 1, seed=3)
    with torch.no_grad():
        a.weights[0].decoder.copy_(torch.eye(WIDTH)[:1])

    def turned(source: Source, *degrees: float) -> Crosscoder:
        one = like(a, source, [0] * len(degrees))
        angles = torch.tensor(degrees).deg2rad().double()
        with torch.no_grad():
            one.weights[0].decoder.zero_()
            one.weights[0].decoder[:, 0], one.weights[0].decoder[:, 1] = angles.cos(), angles.sin()
        return one

    cc = crosscoder(acausal(LAYERS, num_latents=6))
    found = warm_start(cc, {A: a, B: turned(LAYERS[B], -45, 40), C: turned(LAYERS[C], 80)}, similarity=0.6)
    # B: 40° joins 0°; −45° would, but that place is taken. C: 80° is too far from 0°, but not from 40°.
    assert found.origin[:2].tolist() == [[0, 1, 0], [-1, 0, -1]]
    assert found.taken == (1, 1, 0) and found.merged == (0, 1, 1)


def test_latents_that_are_always_on_are_not_alike_for_that() -> None:
    a, b = dictionary(LAYERS[A], seed=3), dictionary(LAYERS[B], seed=4)
    with torch.no_grad():
        a.weights[0].encoder_bias.fill_(50)
        b.weights[0].encoder_bias.fill_(50)
    rows = torch.randn(300, 2 * WIDTH, generator=generator(1)).double()
    assert warm_start(crosscoder(acausal(PAIR, num_latents=10)), {A: a, B: b}, rows=rows).merged == (0, 0)


def test_unequal_widths_merge_by_their_values_on_rows_only() -> None:
    wide = SourceSet([LAYERS[A], Source("chat", "embed", 9)])
    a = dictionary(wide[A], seed=3)
    b = dictionary(wide["chat/embed"], seed=4)
    lift = torch.linalg.qr(torch.randn(9, 9, generator=generator(0)).double()).Q[:WIDTH]
    with torch.no_grad():
        b.set_normaliser(torch.zeros(9), a.scale)
        b.weights[0].encoder.copy_(a.weights[0].encoder.flip(0) @ lift)
        b.weights[0].encoder_bias.copy_((a.weights[0].encoder_bias - a.weights[0].encoder @ (a.mean * a.scale)).flip(0))
    x = torch.randn(300, WIDTH, generator=generator(1)).double()
    rows = torch.cat([x, x @ lift], dim=1)
    torch.testing.assert_close(values(b, rows[:, WIDTH:]), values(a, x).flip(1))  # the same latents, in another order
    cc = crosscoder(acausal(wide, num_latents=12))
    assert warm_start(cc, {A: a, "chat/embed": b}).merged == (0, 0)
    found = warm_start(cc, {A: a, "chat/embed": b}, rows=rows)
    held = found.origin[(found.origin >= 0).all(1)]
    alive = int((values(a, x) > 0).any(0).sum())
    assert len(held) == found.merged[1] == alive > 2
    assert bool((held.sum(1) == 4).all())


def test_most_often_used_latents_come_first_and_what_does_not_fit_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    a = dictionary(LAYERS[A], seed=3)
    with torch.no_grad():
        a.weights[0].encoder_bias.copy_(torch.tensor([-1.0, 3.0, -3.0, 0.0, 1.0]))
    rows = a.mean + torch.randn(500, WIDTH, generator=generator(0)).double() / a.scale
    order = (values(a, rows) > 0).sum(0).argsort(descending=True).tolist()
    cc = crosscoder(sae(LAYERS[A], num_latents=3))
    found = warm_start(cc, {A: a}, rows=rows)
    assert found.origin[:, 0].tolist() == order[:3] and order[0] == 1
    assert found.left_out == (2,)
    assert "no room for 2 latents" in caplog.text
    assert warm_start(cc, {A: a}).origin[:, 0].tolist() == [0, 1, 2]
    assert found.table().to_pylist() == [{"source": A, "offered": 5, "taken": 3, "merged": 0, "left_out": 2}]


def test_without_rows_sources_fill_in_turn() -> None:
    cc = crosscoder(acausal(PAIR, num_latents=4))
    found = warm_start(cc, {B: dictionary(LAYERS[B], seed=9), A: dictionary(LAYERS[A], seed=3)}, similarity=1.0)
    assert found.origin.tolist() == [[0, -1], [-1, 0], [1, -1], [-1, 1]]
    assert found.sources == (A, B) and found.left_out == (3, 3)


def test_causal_groups_get_latents_of_the_source_they_read_with_the_rows_of_later_matches() -> None:
    a, c = dictionary(LAYERS[A], 4, seed=3), dictionary(LAYERS[C], 4, seed=5)
    b = like(a, LAYERS[B], [1, 1, 2], noise=0.01)
    cc = crosscoder(weakly_causal(LAYERS, num_latents_per_layer=6))
    found = warm_start(cc, {A: a, B: b, C: c})
    assert found.merged[1] == 2
    first = found.origin[:6]
    assert first[:4, 0].tolist() == [0, 1, 2, 3] and bool((first[4:] < 0).all())
    assert bool((found.origin[6:, 0] < 0).all()) and bool((found.origin[12:, 1] < 0).all())
    merged = (first[:, 1] >= 0).nonzero().squeeze(1)
    expected = b.decoder_rows(B, "raw")[first[merged, 1]]
    torch.testing.assert_close(cc.decoder_rows(B, "raw")[merged], expected)
    x = torch.randn(50, 3 * WIDTH, generator=generator(0)).double()
    torch.testing.assert_close(values(cc, x)[:, :4], values(a, x[:, :WIDTH]))  # means of what is read


def test_unmatched_sources_keep_the_direction_at_a_small_norm() -> None:
    sources = SourceSet([LAYERS[A], LAYERS[B], Source("chat", "embed", 9)])
    cc = crosscoder(acausal(sources, num_latents=5))
    drawn = cc.decoder_rows("chat/embed").clone()
    warm_start(cc, {A: dictionary(LAYERS[A], seed=3)}, unmatched_norm=0.2)
    own = cc.decoder_rows(A)
    torch.testing.assert_close(cc.decoder_rows(B), 0.2 * own)
    torch.testing.assert_close(cc.decoder_norms()[:, 2], 0.2 * own.norm(dim=1))
    torch.testing.assert_close(normalize(cc.decoder_rows("chat/embed"), dim=1), normalize(drawn, dim=1))
    torch.testing.assert_close(cc.gate, cc.decoder_norms().sum(1))
    assert int(cc.weights[0].encoder[:, WIDTH:].count_nonzero()) == 0


def test_unmatched_latents_go_to_the_group_that_writes_least() -> None:
    groups = [LatentGroup("shared", 4, (A, B), (A, B)), LatentGroup("own", 2, (A,), (A,))]
    a = dictionary(LAYERS[A], seed=3)
    cc = crosscoder(Wiring(PAIR, groups))
    found = warm_start(cc, {A: a, B: like(a, LAYERS[B], [4])})
    assert found.origin.tolist() == [[2, -1], [3, -1], [4, 0], [-1, -1], [0, -1], [1, -1]]


@pytest.mark.parametrize("tied", ["decoder", "norm"])
def test_ties_hold_from_the_start(tied: str) -> None:
    a = dictionary(LAYERS[A], seed=3)
    b = like(a, LAYERS[B], [0, 1, 2], noise=0.1)
    cc = crosscoder(Wiring(PAIR, [LatentGroup("all", 6, PAIR.keys, PAIR.keys, tied=tied)]))
    found = warm_start(cc, {A: a, B: b})
    assert found.merged == (0, 3)
    norms = cc.decoder_norms()
    torch.testing.assert_close(norms[:, 0], norms[:, 1])
    equal = torch.isclose(cc.decoder_rows(A), cc.decoder_rows(B)).all(1).tolist()
    assert equal == [tied == "decoder" or origin < 0 for origin in found.origin[:, 1].tolist()]


@pytest.mark.parametrize("kind", [ReLU(), BatchTopK(3)], ids=["relu", "batch_topk"])
def test_a_started_crosscoder_explains_rows_that_a_drawn_one_does_not(kind: ReLU | BatchTopK) -> None:
    directions = normalize(torch.randn(5, WIDTH, generator=generator(0)), dim=1).double()
    fires = torch.rand(400, 5, generator=generator(1)).double() * (torch.rand(400, 5, generator=generator(2)) < 0.3)
    x = (fires @ directions).repeat(1, 2)
    a = crosscoder(sae(LAYERS[A], num_latents=5), kind)
    with torch.no_grad():
        a.set_normaliser(torch.zeros(WIDTH), torch.ones(1))
        a.weights[0].decoder.copy_(directions)
        a.weights[0].encoder.copy_(torch.linalg.pinv(directions).T)
    a.refresh_gate()
    cc = crosscoder(acausal(PAIR, num_latents=5), kind).train()
    a.train()

    def error() -> float:
        return float((cc(x) - x).detach().square().sum() / (x - x.mean(0)).square().sum())

    before = error()
    b = like(a, LAYERS[B], [3, 1, 4, 0, 2]).train()
    warm_start(cc, {A: a, B: b})
    assert error() < 0.05 < 0.5 < before


def test_what_does_not_fit_is_refused() -> None:
    a = dictionary(LAYERS[A], seed=3)
    cc = crosscoder(acausal(PAIR, num_latents=4))
    with pytest.raises(UnknownSource, match="layers.2"):
        warm_start(cc, {C: a})
    with pytest.raises(SourceMismatch, match="width 6"):
        warm_start(cc, {A: dictionary(Source("base", "embed", 7), seed=3)})
    with pytest.raises(SourceMismatch, match="one source"):
        warm_start(cc, {A: crosscoder(acausal(PAIR, num_latents=4))})
    with pytest.raises(SourceMismatch, match="expected packed rows of width 12"):
        warm_start(cc, {A: a}, rows=torch.zeros(5, 6).double())
    with pytest.raises(ConfigError, match="none"):
        warm_start(cc, {})
    with pytest.raises(ConfigError, match="similarity"):
        warm_start(cc, {A: a}, similarity=1.5)
    with pytest.raises(ConfigError, match="folded"):
        warm_start(cc.folded(), {A: a})
    reads_only = crosscoder(Wiring(PAIR, [LatentGroup("across", 4, (A,), (B,))]))
    with pytest.raises(WiringError, match="no group both reads and writes"):
        warm_start(reads_only, {A: a})
