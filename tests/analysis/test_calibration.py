"""Bounds of shares, cut-offs that null seeds decide and other seeds test, and scores of specificity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crosscoder.analysis.calibrated import calibrate, check_cut, found_beyond, histogram
from crosscoder.analysis.classes import latent_classes
from crosscoder.analysis.latent_scaling import LatentScaling, scaling
from crosscoder.analysis.passes import watch
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.analysis.shares import binomial_upper, most_allowed, seeds_upper, share_of, student_quantile
from crosscoder.analysis.specificity import Specificity, specificity
from crosscoder.errors import TextError

from .worlds import ListedActivations, random_crosscoder, random_rows


def chance_of_at_most(found: int, total: int, share: float) -> float:
    """P(Binomial(total, share) <= found), term by term."""
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(found + 1))


@pytest.mark.parametrize(("found", "total"), [(0, 20), (3, 20), (19, 20), (12, 500)])
def test_the_binomial_bound_leaves_five_percent(found: int, total: int) -> None:
    """At the bound, as few as were found have the chance 5 %; all of all has no bound but 1."""
    assert chance_of_at_most(found, total, binomial_upper(found, total)) == pytest.approx(0.05, rel=1e-6)
    assert binomial_upper(total, total) == 1.0


def test_the_most_allowed_is_the_last_whose_bound_is_within() -> None:
    """And there is none where even zero of so few is too uncertain: 3 / .002 = 1,500 latents are needed."""
    most = most_allowed(6000, 0.002)
    assert most is not None
    assert binomial_upper(most, 6000) <= 0.002 < binomial_upper(most + 1, 6000)
    assert most_allowed(1400, 0.002) is None and most_allowed(1600, 0.002) == 0


@pytest.mark.parametrize(("freedom", "value"), [(1, 6.313752), (2, 2.919986), (5, 2.015048), (30, 1.697261)])
def test_student_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(value, abs=2e-5)


def test_the_larger_of_both_bounds_counts() -> None:
    """Seeds that differ widen the bound beyond that of latents; a single seed has no bound by seeds."""
    alike, unlike = share_of([5, 5, 5], [1000] * 3), share_of([0, 0, 15], [1000] * 3)
    assert alike.share == unlike.share == 0.005
    assert alike.upper == alike.upper_by_latents == unlike.upper_by_latents < unlike.upper
    shares = np.array([0, 0, 0.015])
    assert unlike.upper_by_seeds == pytest.approx(shares.mean() + 2.919986 * shares.std(ddof=1) / 3**0.5, rel=1e-4)
    assert seeds_upper([0.9, 0.1]) == 1.0
    one = share_of([5], [1000])
    assert one.upper_by_seeds is None and one.upper == one.upper_by_latents


def test_a_cut_is_an_order_statistic_and_is_tested_elsewhere() -> None:
    """By hand: of 6,000 scores 0 .. 5,999, m may lie beyond, so that the cut is the (m + 1)-th largest."""
    scores = {1: torch.arange(0, 6000, 2.0), 2: torch.cat([torch.arange(1, 6000, 2.0), torch.tensor([torch.nan])])}
    cut = calibrate(scores, score="norm", side="b")
    most = most_allowed(6000, 0.002)
    assert most is not None and cut.value == 5999 - most
    assert (cut.num_beyond, cut.num_latents, cut.assured, cut.seeds) == (most, 6000, True, (1, 2))
    test = check_cut(cut, {3: torch.tensor([cut.value, cut.value + 1, 0.0, torch.nan])})
    assert test is not None and (test.false_share.num_found, test.false_share.num_latents) == (1, 3)
    assert check_cut(cut, {}) is None
    pair = found_beyond(cut, test, torch.cat([torch.full((10,), 9999.0), torch.zeros(20)]), run="pair")
    assert (pair.num_beyond, pair.num_latents, pair.expected) == (10, 30, pytest.approx(10))
    assert pair.false_discovery_rate == pytest.approx(1.0) and pair.false_discovery_rate_upper == 1.0
    untested = found_beyond(cut, None, torch.tensor([9999.0, 0.0]), run="pair")
    assert untested.expected == pytest.approx(0.004) and untested.false_discovery_rate_upper is None
    nothing = found_beyond(cut, test, torch.zeros(5), run="pair")
    assert nothing.false_discovery_rate is None


def test_too_few_null_latents_are_not_called_assured() -> None:
    """The cut is then the largest of them; without any there is none."""
    cut = calibrate({1: torch.arange(100.0)}, score="norm", side="b")
    assert (cut.value, cut.num_beyond, cut.assured) == (99.0, 0, False)
    with pytest.raises(TextError, match="null latents with a score 'norm'"):
        calibrate({1: torch.full((3,), torch.nan)}, score="norm", side="b")


def test_the_tolerance_bound_holds_in_nearly_all_samples() -> None:
    """Of 200 calibrations on uniform scores at most about 5 % have a true share beyond the wanted one."""
    generator = torch.Generator().manual_seed(0)
    cuts = [calibrate({1: torch.rand(4000, generator=generator)}, score="norm", side="b").value for _ in range(200)]
    too_low = sum(1 - cut > 0.002 for cut in cuts)
    assert too_low <= 20
    assert float(np.median(cuts)) < 0.9995  # not merely the largest score


def test_histograms_count_scores_from_0_to_1() -> None:
    found = histogram([torch.tensor([0.0, 0.011, 0.03, torch.nan]), torch.tensor([1.0])])
    assert len(found) == 50 and found[:2] == (2, 1) and found[-1] == 1 and sum(found) == 4


def measured(num_rows: int = 200, min_active: int = 10) -> tuple[Specificity, LatentScaling, LatentScaling]:
    """A random crosscoder on random rows: its specificities, and the scaling towards a and towards b."""
    cc = random_crosscoder(num_latents=20)
    sums = ScalingSums(cc, [("base", "chat"), ("chat", "base")], bootstrap=None)
    watch(cc, ListedActivations(cc.sources, random_rows(cc.sources, num_rows)), reconstructions=[sums])
    toward_a, toward_b = scaling(sums, a="chat", b="base"), scaling(sums, a="base", b="chat")
    found = specificity(latent_classes(cc, a="base", b="chat"), toward_a, toward_b, min_active=min_active)
    return found, toward_a, toward_b


def test_scores_are_what_they_are_said_to_be() -> None:
    """Latent by latent from norms and ν, on either side; NaN below `min_active`."""
    found, toward_a, toward_b = measured()
    for latent in range(20):
        norm_b = float(found.relative_norm[latent])
        for side, norm, scaled in (("a", 1 - norm_b, toward_a), ("b", norm_b, toward_b)):
            if int(scaled.num_active[latent]) < 10:
                assert math.isnan(float(found.score("norm", side)[latent]))
                continue
            betas = float(scaled.beta_error_b[latent]), float(scaled.beta_reconstruction_b[latent])
            ratio = max(abs(float(scaled.nu_error[latent])), abs(float(scaled.nu_reconstruction[latent])))
            expected = min(1.0, max(0.0, 1 - ratio)) if min(betas) > 0 else 0.0
            assert float(found.score("norm", side)[latent]) == pytest.approx(norm)
            assert float(found.score("scaling", side)[latent]) == pytest.approx(expected)
            joint = min(max(0.0, 2 * norm - 1), expected)
            assert float(found.score("joint", side)[latent]) == pytest.approx(joint)
    assert int(found.live.sum()) > 0 and found.names == ("norm", "scaling", "joint")


def test_rare_latents_have_no_part() -> None:
    found = measured(num_rows=12, min_active=12)[0]
    assert int(found.live.sum()) < 20
    assert bool(found.score("joint", "b")[~found.live].isnan().all()) and len(found.live_norms) == int(found.live.sum())


def test_unequal_widths_leave_norms_alone() -> None:
    """The reason is kept; norms are still comparable."""
    cc = random_crosscoder(widths=(6, 4))
    sums = ScalingSums(cc, [("base", "chat"), ("chat", "base")], bootstrap=None)
    watch(cc, ListedActivations(cc.sources, random_rows(cc.sources, 100)), reconstructions=[sums])
    toward_a, toward_b = scaling(sums, a="chat", b="base"), scaling(sums, a="base", b="chat")
    found = specificity(latent_classes(cc, a="base", b="chat"), toward_a, toward_b)
    assert found.names == ("norm",) and found.reason is not None and "wide" in found.reason


def test_specificities_are_kept_for_the_run_that_they_are_of(tmp_path: Path) -> None:
    """Exactly, and not for another fingerprint."""
    found = measured()[0]
    path = tmp_path / "specificity.parquet"
    found.save(path, fingerprint="this")
    again = Specificity.load(path, fingerprint="this")
    assert again is not None and again.names == found.names and (again.a, again.b) == (found.a, found.b)
    assert torch.equal(again.live, found.live) and torch.equal(again.num_active, found.num_active)
    for key, values in found.scores.items():
        torch.testing.assert_close(again.scores[key], values, equal_nan=True, rtol=0, atol=0)
    assert Specificity.load(path, fingerprint="other") is None
    assert Specificity.load(tmp_path / "nowhere.parquet", fingerprint="this") is None
    assert pq.read_schema(path).metadata[b"format"] == b"crosscoder.specificity/1"
