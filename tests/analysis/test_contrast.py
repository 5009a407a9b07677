"""Contrasting prompt sets: against definitions written out here, on planted truth, and where nothing is planted."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from crosscoder.analysis.contrasts import contrast, held_out_contrast
from crosscoder.analysis.prompts import PromptValues
from crosscoder.analysis.rank_tests import (
    CentredRanks,
    Deals,
    auroc_interval,
    benjamini_hochberg,
    difference_interval,
    mean_reaching,
    p_values,
)
from crosscoder.codes import SparseCode
from crosscoder.errors import TextError


def sparse_values(num_prompts: int, num_latents: int, *, seed: int, share: float = 0.3) -> torch.Tensor:
    """Prompts × latents, mostly zero, with ties among what is not."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(num_prompts, num_latents, generator=generator) < share
    return torch.where(active, torch.randint(1, 6, active.shape, generator=generator).double(), 0.0)


def values_of(dense: torch.Tensor, lengths: torch.Tensor | None = None) -> PromptValues:
    code = SparseCode.from_dense(dense.double())
    return PromptValues(code, code, torch.full((len(dense),), 7) if lengths is None else lengths)


def naive_auroc(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    pairs = a[:, None, :] - b[None, :, :]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean((0, 1))


def test_auroc_is_the_share_of_pairs_that_are_in_order() -> None:
    a, b = sparse_values(9, 30, seed=1), sparse_values(13, 30, seed=2, share=0.6)
    found = contrast(values_of(a), values_of(b), num_permutations=10)
    expected = naive_auroc(a, b)[found.latents]
    torch.testing.assert_close(found.auroc, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.auroc_of_mean, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.frequency_a, (a > 0).double().mean(0)[found.latents])
    torch.testing.assert_close(found.difference, found.frequency_a - found.frequency_b)


def test_z_has_the_variance_of_all_deals() -> None:
    """Over every one of the C(9, 4) ways to deal out the labels, z has mean 0 and variance 1, ties and all."""
    dense = sparse_values(9, 20, seed=3)
    live = (dense > 0).any(0).nonzero().squeeze(1)
    ranks = CentredRanks.of(SparseCode.from_dense(dense), live)
    labels = torch.zeros(9, math.comb(9, 4), dtype=torch.bool)
    for deal, chosen in enumerate(combinations(range(9), 4)):
        labels[list(chosen), deal] = True
    z = ranks.z(labels)
    torch.testing.assert_close(z.mean(1), torch.zeros(len(live), dtype=torch.float64), rtol=0, atol=1e-12)
    constant = (dense[:, live] == dense[0, live]).all(0)
    torch.testing.assert_close(z.square().mean(1), (~constant).double(), rtol=0, atol=1e-12)


def test_u_is_that_of_the_definition_for_any_deal() -> None:
    dense = sparse_values(12, 25, seed=4)
    live = torch.arange(25)
    ranks = CentredRanks.of(SparseCode.from_dense(dense), live)
    from_a = torch.rand(12, generator=torch.Generator().manual_seed(0)) < 0.4
    num_a, num_b = int(from_a.sum()), int((~from_a).sum())
    expected = (naive_auroc(dense[from_a], dense[~from_a]) - 0.5) * num_a * num_b
    torch.testing.assert_close(ranks.above_expected(from_a[:, None]).squeeze(1), expected, rtol=0, atol=1e-12)


def test_p_agrees_with_all_deals_counted() -> None:
    """Rare latents included, for which the normal distribution alone would be wrong."""
    dense = sparse_values(10, 40, seed=5, share=0.2)
    live = (dense > 0).any(0).nonzero().squeeze(1)
    ranks = CentredRanks.of(SparseCode.from_dense(dense), live)
    every = torch.zeros(10, math.comb(10, 5), dtype=torch.bool)
    for deal, chosen in enumerate(combinations(range(10), 5)):
        every[list(chosen), deal] = True
    from_a = torch.arange(10) < 5
    z = ranks.z(from_a[:, None])
    exact = (ranks.z(every).abs() >= z.abs() - 1e-9).double().mean(1)
    family = (ranks.z(every).abs().max(0).values[None] >= z.abs() - 1e-9).double().mean(1)
    p, p_family = p_values(ranks, Deals(from_a, 20_000, seed=1))
    torch.testing.assert_close(p, exact, rtol=0, atol=0.015)
    torch.testing.assert_close(p_family, family, rtol=0, atol=0.015)


def test_benjamini_hochberg_by_hand() -> None:
    p = torch.tensor([0.04, 0.01, 0.03, 0.5], dtype=torch.float64)
    expected = torch.tensor(
        [0.16 / 3, 0.04, 0.16 / 3, 0.5], dtype=torch.float64
    )  # .03 · 4/2 = .06 gives way to .04 · 4/3
    torch.testing.assert_close(benjamini_hochberg(p), expected)
    assert benjamini_hochberg(torch.ones(3, dtype=torch.float64)).tolist() == [1, 1, 1]


def test_auroc_interval_solves_its_equation_and_has_a_width_at_one() -> None:
    area = torch.tensor([0.3, 0.5, 0.83, 1.0, 0.0], dtype=torch.float64)
    low, high = auroc_interval(area, 20, 30)
    for theta, at in ((low, area), (high, area)):
        q1, q2, middle = theta / (2 - theta), 2 * theta**2 / (1 + theta), 25
        variance = theta * (1 - theta) + (middle - 1) * ((q1 - theta**2) + (q2 - theta**2))
        gap = (theta - at).abs() - 1.959964 * (variance / 600).sqrt()
        inside = (theta > 1e-9) & (theta < 1 - 1e-9)
        assert bool((gap[inside].abs() < 1e-6).all())
    assert 0.85 < float(low[3]) < 0.95 and float(high[3]) == 1.0
    torch.testing.assert_close(high[4], 1 - low[3])


def test_difference_interval_is_the_published_example() -> None:
    """Newcombe 1998, table II, method 10: 56/70 − 48/80 gives .0524 to .3339; 10/10 − 0/10 gives .6075 to 1."""
    share = torch.tensor([56 / 70], dtype=torch.float64), torch.tensor([48 / 80], dtype=torch.float64)
    low, high = difference_interval(*share, num_a=70, num_b=80)
    assert (round(float(low), 4), round(float(high), 4)) == (0.0524, 0.3339)
    whole = torch.ones(1, dtype=torch.float64)
    low, high = difference_interval(whole, 0 * whole, num_a=10, num_b=10)
    assert (round(float(low), 4), round(float(high), 4)) == (0.6075, 1.0)


def planted(seed: int, *, num: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """400 latents; 0 to 7 fire in four of five prompts of A and one of five of B, 8 to 11 the other way about."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.full((2, 400), 0.25)
    chance[0, :8], chance[1, :8] = 0.8, 0.2
    chance[0, 8:12], chance[1, 8:12] = 0.1, 0.8
    sides = []
    for side in range(2):
        active = torch.rand(num, 400, generator=generator) < chance[side]
        sides.append(torch.where(active, torch.rand(num, 400, generator=generator).double() + 0.1, 0.0))
    return sides[0], sides[1]


def test_planted_latents_are_found_and_others_are_not() -> None:
    a, b = planted(0)
    found = contrast(values_of(a), values_of(b), num_permutations=300)
    assert set(range(12)) <= set(found.found.tolist())
    assert len(found.found) <= 14
    assert found.by_lot < 1
    sign = {latent: area > 0.5 for latent, area in zip(found.latents.tolist(), found.auroc.tolist(), strict=True)}
    assert all(sign[latent] == (latent < 8) for latent in range(12))
    assert set(found.table()["latents"].to_pylist()[:12]) == set(range(12))


def test_where_nothing_differs_next_to_nothing_is_found() -> None:
    """Forty null contrasts at a rate of .05: a false discovery in about two of them, six at the most."""
    hits = 0
    for seed in range(40):
        a, b = sparse_values(20, 60, seed=100 + seed), sparse_values(20, 60, seed=200 + seed)
        hits += len(contrast(values_of(a), values_of(b), num_permutations=200, seed=seed).found) > 0
    assert hits <= 6


def test_the_other_half_judges_what_one_half_chose() -> None:
    """Under the null the chosen fall back to ½ on the other half; planted ones stay."""
    a, b = planted(1, num=120)
    judged = held_out_contrast(values_of(a), values_of(b), num_permutations=200)
    assert judged.choosing.num_a == judged.scoring.num_a == 60
    assert judged.scoring.latents.tolist() == sorted(judged.choosing.found.tolist())
    assert set(range(8)) <= set(judged.scoring.found.tolist())
    some = held_out_contrast(values_of(a), values_of(b), among=torch.tensor([3, 50]), num_permutations=200)
    assert some.choosing.latents.tolist() == [3, 50] and set(some.scoring.latents.tolist()) <= {3, 50}
    none = held_out_contrast(values_of(a), values_of(a), num_permutations=100, level=0.001)
    assert len(none.scoring.latents) == 0 and math.isnan(none.scoring.by_lot)


def test_by_lot_counts_latents_that_a_deal_brings_as_far() -> None:
    dense = sparse_values(10, 15, seed=6)
    live = (dense > 0).any(0).nonzero().squeeze(1)
    ranks = CentredRanks.of(SparseCode.from_dense(dense), live)
    deals = Deals(torch.arange(10) < 5, 300, seed=2)
    assert mean_reaching(ranks, deals, 0.0) == len(live)
    assert 0 < mean_reaching(ranks, deals, 1.5) < len(live) / 2
    assert mean_reaching(ranks, deals, 1.5) == mean_reaching(ranks, deals, 1.5)


def test_length_is_measured_as_a_rival() -> None:
    a, b = sparse_values(8, 10, seed=7), sparse_values(8, 10, seed=8)
    lengths = torch.arange(8) + 20, torch.arange(8)
    assert contrast(values_of(a, lengths[0]), values_of(b, lengths[1]), num_permutations=10).auroc_of_length == 1.0


def test_too_few_prompts_are_refused() -> None:
    few, many = sparse_values(3, 5, seed=0), sparse_values(9, 5, seed=1)
    with pytest.raises(TextError, match="at least 4 prompts on each side; got 3 of A and 9 of B"):
        contrast(values_of(few), values_of(many))
    with pytest.raises(TextError, match="at least 4"):
        held_out_contrast(values_of(many[:6]), values_of(many))


def test_the_summary_is_json_with_the_best_first() -> None:
    a, b = planted(2, num=20)
    told = contrast(values_of(a), values_of(b), num_permutations=50).to_json(5)
    assert len(told["latents"]) == 5 and told["num_tested"] <= 400
    order = [abs(row["auroc"] - 0.5) for row in told["latents"]]
    assert order == sorted(order, reverse=True)
    assert np.isfinite(told["auroc_of_length"])
