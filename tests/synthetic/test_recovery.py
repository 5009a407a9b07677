"""Recovery of exclusive concepts and of spans: perfect on the truth, and wrong in the way in which it was spoilt."""

from __future__ import annotations

import math

import pytest
import torch

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.synthetic import (
    CUTS,
    VERDICTS,
    ConceptWorld,
    ExclusiveRecovery,
    densities,
    exclusive_recovery,
    exclusivity,
    firing_density,
    null_world,
    recall_by_frequency,
    span_recovery,
)
from crosscoder.synthetic.curves import wilson
from synthetic.planted_decoders import LAYERS, WORLD, planted

TRUTH = WORLD.truth
SHARED = TRUTH.shared.nonzero().flatten().tolist()
ONLY_A = TRUTH.exclusive_to("base").nonzero().flatten().tolist()
ONLY_B = TRUTH.exclusive_to("chat").nonzero().flatten().tolist()
WIDTH_A = WORLD.sources.widths[0]


def recovery(cc: Crosscoder, **kwargs: object) -> ExclusiveRecovery:
    return exclusive_recovery(cc, TRUTH, a="base", b="chat", **kwargs)


def decoder(cc: Crosscoder) -> torch.Tensor:
    return cc.weights[0].decoder.data


def test_statistics_by_hand() -> None:
    norms = torch.tensor([[1.0, 0.25], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    assert exclusivity(norms, "share")[:3].tolist() == pytest.approx([0.2, 1.0, 0.5])
    assert exclusivity(norms, "relative_norm")[:3].tolist() == pytest.approx([0.125, 1.0, 0.5])
    assert bool(exclusivity(norms, "share")[3].isnan())


@pytest.mark.parametrize("name", CUTS)
def test_the_truth_is_recovered_perfectly(name: str) -> None:
    found = recovery(planted(scale=(0.9, 1.2)), cuts=CUTS[name])
    assert found.recall == found.matched_recall == found.precision == 1
    assert found.num_called == len(ONLY_A) + len(ONLY_B)
    assert found.false_exclusive_rate == 0
    assert found.num_shrunk == found.num_nothing == found.num_decoupled == 0
    assert found.concept[: TRUTH.num_concepts].tolist() == [*range(TRUTH.num_concepts)]
    verdicts = found.table().column("verdict").to_pylist()
    assert [i for i, verdict in enumerate(verdicts) if verdict == "right"] == ONLY_A + ONLY_B


def test_norms_are_those_of_normalised_space() -> None:
    """Sources of unequal scale: what is shared in one space is exclusive in the other."""
    assert recovery(planted(scale=(0.5, 4.0))).num_shrunk == len(SHARED)


def test_shrinkage_is_a_shared_concept_called_exclusive() -> None:
    cc = planted()
    decoder(cc)[SHARED[2], WIDTH_A:] *= 0.1
    found = recovery(cc)
    assert found.num_shrunk == 1
    assert found.verdicts[SHARED[2]] == VERDICTS.index("shrunk")
    assert found.precision == pytest.approx(8 / 9)
    assert found.false_exclusive_rate == pytest.approx(1 / len(found.live))
    assert found.recall == 1
    assert found.num_decoupled == 0


def test_decoupling_is_a_shared_concept_in_two_halves() -> None:
    cc = planted()
    spare = TRUTH.num_concepts
    decoder(cc)[spare, WIDTH_A:] = decoder(cc)[SHARED[0], WIDTH_A:]
    decoder(cc)[SHARED[0], WIDTH_A:] = 0
    found = recovery(cc)
    assert found.num_decoupled == 1
    assert found.decoupled.nonzero().flatten().tolist() == [SHARED[0]]
    assert found.num_shrunk == 2
    decoder(cc)[spare] = 0
    assert recovery(cc).num_decoupled == 0


def test_two_latents_on_one_side_are_not_decoupling() -> None:
    cc = planted()
    decoder(cc)[SHARED[0], WIDTH_A:] = 0
    decoder(cc)[TRUTH.num_concepts] = decoder(cc)[SHARED[0]]
    assert recovery(cc).num_shrunk == 2
    assert recovery(cc).num_decoupled == 0


def test_latents_that_match_nothing_are_told_apart() -> None:
    cc = planted()
    decoder(cc)[-1, :WIDTH_A] = torch.randn(WIDTH_A, generator=torch.Generator().manual_seed(0))
    found = recovery(cc)
    assert (found.num_nothing, found.num_shrunk) == (1, 0)


def test_a_concept_whose_latent_is_called_shared_is_missed() -> None:
    cc = planted()
    decoder(cc)[ONLY_B[0], :WIDTH_A] = 0.9 * decoder(cc)[SHARED[0], :WIDTH_A]
    found = recovery(cc)
    assert found.recall == pytest.approx(7 / 8)
    assert found.matched_recall == 1
    assert found.precision == 1


def test_the_wrong_side_does_not_count() -> None:
    """A latent called a-only cannot recover a concept of b, whatever its direction at b."""
    cc = planted()
    decoder(cc)[ONLY_B[0], :WIDTH_A] = 20 * decoder(cc)[SHARED[0], :WIDTH_A]
    found = recovery(cc)
    assert found.recall == pytest.approx(7 / 8)
    assert found.num_shrunk == 1


def test_dead_latents_are_left_out() -> None:
    density = torch.ones(TRUTH.num_concepts + 3)
    density[ONLY_A[0]] = 0
    found = recovery(planted(), density=density)
    assert found.recall == found.matched_recall == pytest.approx(7 / 8)
    assert found.num_called == 7
    assert not bool(found.live[ONLY_A[0]])


def test_a_world_without_exclusive_concepts_has_no_recall() -> None:
    nothing_differs = ConceptWorld(null_world("same"))
    found = exclusive_recovery(planted(nothing_differs), nothing_differs.truth, a="base", b="chat")
    assert math.isnan(found.recall) and found.num_called == 0
    nothing = torch.zeros(TRUTH.num_concepts + 3)
    assert math.isnan(recovery(planted(), density=nothing).precision)


def _layer(number: int) -> str:
    return f"base/layers.{number}.resid_post"


def test_one_source_twice_is_refused() -> None:
    with pytest.raises(SourceMismatch, match="two sources"):
        exclusive_recovery(planted(), TRUTH, a="base", b="base")


def test_density_is_the_fraction_of_rows() -> None:
    """A concept's latent that reads its own direction fires at least where the concept does, and TopK(1) fires once."""
    cc = planted(spare=0)
    with torch.no_grad():
        cc.weights[0].encoder.copy_(decoder(cc))
    cc.train()
    x = WORLD.draw(0, 3000).x
    found = firing_density(cc, [x[:1000], x[1000:]])
    assert cc.training
    code = cc.eval().encode(x)
    assert torch.allclose(found, (code.to_dense() > 0).float().mean(0))
    assert float(found.sum()) == pytest.approx(code.num_active / 3000, abs=1e-5)


def test_densities_by_class() -> None:
    density = torch.full((TRUTH.num_concepts + 3,), 0.02)
    density[ONLY_A + ONLY_B] = 0.2
    density[-3:] = 0
    found = densities(recovery(planted(), density=density), TRUTH, density=density)
    assert len(found.exclusive) == 8
    assert len(found.shared) == 12
    assert found.ratio == pytest.approx(10)
    assert found.table().column("median").to_pylist()[:2] == pytest.approx([0.2, 0.02])
    expected = TRUTH.frequencies[ONLY_A + ONLY_B].median() / TRUTH.frequencies[SHARED].median()
    assert found.true_ratio == pytest.approx(float(expected))


def test_recall_by_frequency() -> None:
    recovered = torch.tensor([True, False, True, True])
    curve = recall_by_frequency(recovered, torch.tensor([0.01, 0.01, 0.05, 0.2]), edges=(0.001, 0.05, 0.1, 0.15))
    assert curve.num_concepts == (2, 1, 0)
    assert curve.recall[:2] == (0.5, 1.0)
    assert math.isnan(curve.recall[2])
    assert curve.table().num_rows == 3


def test_wilson_by_hand() -> None:
    """Ten of ten: [1 / (1 + z²/n), 1]."""
    low, high = wilson(10, 10)
    assert low == pytest.approx(0.7225, abs=1e-4)
    assert high == pytest.approx(1)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_spans_of_the_truth_are_recovered_perfectly() -> None:
    found = span_recovery(planted(LAYERS, scale=(1.0, 2.0, 0.5, 1.0, 1.0)), LAYERS.truth, norm_cut=0.2)
    assert found.recall == found.exact_fraction == found.mean_overlap == 1
    assert found.mean_error == 0
    assert torch.allclose(found.following, torch.ones(30), atol=1e-5)
    assert found.table().num_rows == 30


def test_a_latent_that_ends_early_is_seen() -> None:
    cc = planted(LAYERS, scale=(1.0,) * 5)
    everywhere = LAYERS.truth.shared.nonzero().flatten()[0]
    decoder(cc)[everywhere, -32:] = 0
    found = span_recovery(cc, LAYERS.truth)
    assert found.span[everywhere].tolist() == [0, 3]
    assert float(found.overlap[everywhere]) == pytest.approx(0.8)
    assert float(found.following[everywhere]) == pytest.approx(0.8, abs=1e-5)
    assert found.exact_fraction == pytest.approx(29 / 30)
    assert found.mean_error == pytest.approx(0.5 / 30)


def test_spans_are_relative_to_the_largest_norm() -> None:
    cc = planted(LAYERS, scale=(1.0,) * 5)
    decoder(cc).mul_(0.01)
    assert span_recovery(cc, LAYERS.truth).exact_fraction == 1


def test_spans_need_all_sources() -> None:
    with pytest.raises(SourceMismatch, match="all sources of the world"):
        span_recovery(planted(), LAYERS.truth)
