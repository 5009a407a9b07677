"""Which latents survive: beyond a calibrated cut-off by scaling, else the most extreme, else by norm."""

from __future__ import annotations

import pytest
import torch

from crosscoder.analysis.calibrated import Cut, Found
from crosscoder.analysis.pair_controls import CalibratedScore, PairControls
from crosscoder.analysis.specificity import Specificity
from crosscoder.analysis.survivors import ranking, survivors

SCALING_B = torch.tensor([0.2, 0.9, 0.5, torch.nan, 0.7, 0.0], dtype=torch.float64)
NORMS = torch.tensor([0.5, 0.6, 0.95, torch.nan, 0.1, 0.5], dtype=torch.float64)


def scores(*, with_scaling: bool = True) -> Specificity:
    """Six latents, one of them without a part in the comparison."""
    by_norm = {("norm", "a"): 1 - NORMS, ("norm", "b"): NORMS}
    by_scaling = {("scaling", "a"): torch.zeros(6, dtype=torch.float64), ("scaling", "b"): SCALING_B}
    live = torch.tensor([True, True, True, False, True, True])
    return Specificity("a", "b", torch.full((6,), 20), live, NORMS, by_norm | (by_scaling if with_scaling else {}))


def controls(cut: float) -> PairControls:
    """Controls that calibrated scaling towards b alone."""
    found = Found("this run", 5, 2, 0.01, 0.005, None)
    score = CalibratedScore(Cut("scaling", "b", cut, 0.002, (1,), 100, 0, True), None, found, (), None, (), (), ())
    return PairControls("a", "b", "mark", (1,), (), (score,), None, None, None, (), (), None, None)


def test_beyond_a_cut_all_survive_and_nothing_else() -> None:
    """Most specific first, however many were asked for; the cut itself is not beyond."""
    found = survivors(scores(), controls(0.5), num_shown=1)["b"]
    assert found.latents == (1, 4) and found.survive and found.score == "scaling"


def test_without_controls_the_most_extreme_are_shown_and_do_not_survive() -> None:
    """At most as many as asked for; those that are not specific at all never."""
    found = survivors(scores(), None, num_shown=3)
    assert found["b"].latents == (1, 4, 2) and not found["b"].survive
    assert found["a"].latents == ()


def test_norms_serve_where_scaling_has_no_meaning() -> None:
    """Above one half only: at one half both write alike."""
    found = survivors(scores(with_scaling=False), None)
    assert found["b"].score == "norm" and found["b"].latents == (2, 1) and found["a"].latents == (4,)


@pytest.mark.parametrize(
    ("score", "side", "order"), [("scaling", "b", [1, 4, 2, 0, 5]), ("norm", "a", [4, 0, 5, 1, 2])]
)
def test_rankings_hold_every_latent_with_a_part(score: str, side: str, order: list[int]) -> None:
    """Best first, ties in order."""
    assert ranking(scores(), score=score, side=side).tolist() == order
