"""AUROC, F1 and the bootstrap: by hand and against a loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscoder.analysis.ranking import (
    Truth,
    auroc,
    auroc_of_latents,
    best_threshold,
    document_draws,
    f1_score,
)
from crosscoder.codes import SparseCode


def pairwise(score: np.ndarray, truth: Truth, weight: np.ndarray | None = None) -> float:
    """Every pair of a positive and a negative row of one stratum, counted one by one."""
    weight = np.ones(len(score)) if weight is None else weight
    wins = total = 0.0
    for i in np.flatnonzero(truth.positive):
        for j in np.flatnonzero(~truth.positive):
            if truth.stratum[i] == truth.stratum[j]:
                pair = weight[i] * weight[j]
                total += pair
                wins += pair * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
    return wins / total


def example(seed: int, *, rows: int = 60) -> tuple[np.ndarray, Truth]:
    """Sparse scores of few distinct values (many ties), two strata."""
    generator = np.random.default_rng(seed)
    score = generator.integers(0, 5, rows) * (generator.random(rows) < 0.5)
    return score.astype(float), Truth(generator.random(rows) < 0.4, generator.integers(0, 2, rows))


def test_auroc_by_hand() -> None:
    """Positives 3 and 0, negatives 1 and 0: two wins, one tie, one loss."""
    truth = Truth(np.array([True, True, False, False]), np.zeros(4, dtype=int))
    assert auroc(np.array([3.0, 0.0, 1.0, 0.0]), truth).tolist() == [2.5 / 4]


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_the_loop_over_pairs(seed: int) -> None:
    """Ties, strata and weights are exact."""
    score, truth = example(seed)
    weight = np.concatenate(list(document_draws(np.arange(len(score)) // 4, num_draws=3, seed=seed, at_once=2)))
    assert auroc(score, truth)[0] == pytest.approx(pairwise(score, truth), abs=1e-12)
    assert auroc(score, truth, weight) == pytest.approx([pairwise(score, truth, w) for w in weight], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_all_latents_equals_the_loop_over_pairs(seed: int) -> None:
    """The sparse ranking treats inactive rows as one tie at zero; a latent that never fires has one half."""
    generator = np.random.default_rng(seed)
    dense = generator.integers(1, 5, (60, 7)) * (generator.random((60, 7)) < generator.random(7))
    dense[:, 3] = 0
    _, truth = example(seed)
    found = auroc_of_latents(SparseCode.from_dense(torch.tensor(dense, dtype=torch.float32)), truth)
    assert found == pytest.approx([pairwise(column, truth) for column in dense.T], abs=1e-12)
    assert found[3] == 0.5


def test_rows_of_different_strata_are_never_compared() -> None:
    """A score that only tells the strata apart has one half."""
    truth = Truth(np.array([True, False, True, False]), np.array([0, 0, 1, 1]))
    assert auroc(np.array([5.0, 5.0, 1.0, 1.0]), truth)[0] == 0.5


def test_without_pairs_there_is_no_auroc() -> None:
    """Positives of one stratum and negatives of another give NaN, not a number."""
    truth = Truth(np.array([True, False]), np.array([0, 1]))
    assert np.isnan(auroc(np.array([1.0, 0.0]), truth)[0])
    assert np.isnan(auroc_of_latents(SparseCode.from_dense(torch.ones(2, 3)), truth)).all()


def test_best_threshold_equals_trying_them_all() -> None:
    """No other cut has a larger F1."""
    for seed in range(5):
        score, truth = example(seed)
        cut = best_threshold(score, truth.positive)
        tried = [f1_score(score, truth.positive, threshold=t) for t in np.unique(score)]
        assert f1_score(score, truth.positive, threshold=cut) == max(tried)


def test_f1_by_hand() -> None:
    """Two hits, one false alarm, one miss: 4 / 6."""
    positive = np.array([True, True, True, False, False])
    assert f1_score(np.array([3.0, 2.0, 0.0, 2.5, 0.0]), positive, threshold=2.0) == pytest.approx(4 / 6)


def test_draws_keep_documents_together() -> None:
    """Rows of one document have one weight; every draw has as many documents as there are."""
    documents = np.array([7, 7, 3, 9, 9, 9])
    draws = np.concatenate(list(document_draws(documents, num_draws=50, seed=1, at_once=7)))
    assert len(draws) == 50
    assert (draws[:, 0] == draws[:, 1]).all() and (draws[:, 3] == draws[:, 5]).all()
    assert (draws[:, 0] + draws[:, 2] + draws[:, 3] == 3).all()
    assert len(np.unique(draws[:, 2])) > 1
