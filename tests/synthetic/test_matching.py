"""Matching of latents and concepts: by hand, against brute force, and on crosscoders whose decoder is the truth."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import NonFiniteActivations, SourceMismatch
from crosscoder.nonlinearities import TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.synthetic import assign, cosines, match, matching
from crosscoder.wiring import acausal
from synthetic.planted_decoders import WORLD, planted


def test_by_hand() -> None:
    """Both concepts like latent 0 best; one-to-one, concept 0 has to take latent 1."""
    found = match(torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.0, 0.3]]))
    assert found.best_latent.tolist() == [0, 0]
    assert found.mean_max_cosine == pytest.approx(0.85)
    assert found.latents.tolist() == [1, 0]
    assert found.concepts.tolist() == [0, 1]
    assert found.matched_cosine == pytest.approx(0.75)
    assert found.unique_fraction == 0.5
    assert found.recovered(0.85) == 0.5
    assert found.table().column("best_latent").to_pylist() == [0, 0]


def test_concepts_without_a_latent_count_nothing() -> None:
    found = match(torch.tensor([[0.9, 0.8, 1.0]]))
    assert found.concepts.tolist() == [2]
    assert found.matched_cosine == pytest.approx(1 / 3)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 10**6), steps=st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_assignment_equals_brute_force(rows: int, columns: int, seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    similarity = rng.integers(-steps, steps, (rows, columns)) / steps  # ties included
    i, j = assign(similarity)
    assert len(set(i.tolist())) == len(set(j.tolist())) == len(i) == min(rows, columns)
    wide = similarity if rows <= columns else similarity.T
    best = max(wide[range(len(wide)), list(p)].sum() for p in permutations(range(wide.shape[1]), len(wide)))
    assert similarity[i, j].sum() == pytest.approx(best)


def test_assignment_of_a_hidden_permutation() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(120)
    similarity = rng.uniform(0, 0.5, (150, 120))
    similarity[order, np.arange(120)] = 0.9
    i, j = assign(similarity)
    assert np.array_equal(i[np.argsort(j)], order)


def test_a_decoder_that_is_the_truth_matches_perfectly() -> None:
    found = matching(planted(), WORLD.truth)
    assert found.matched_cosine == pytest.approx(1, abs=1e-5)
    assert found.mean_max_cosine == pytest.approx(1, abs=1e-5)
    assert found.unique_fraction == 1
    assert found.latents.tolist() == [*range(WORLD.truth.num_concepts)]


def test_cosines_are_of_raw_space() -> None:
    """Sources side by side in normalised space would weigh the sources otherwise."""
    cc = planted(scale=(0.2, 5.0))
    assert torch.allclose(cosines(cc, WORLD.truth).diagonal(), torch.ones(WORLD.truth.num_concepts), atol=1e-5)
    at_base = cosines(cc, WORLD.truth, source="base")
    only_chat = WORLD.truth.exclusive_to("chat")
    assert torch.equal(at_base[: len(only_chat)][only_chat], torch.zeros_like(at_base[: len(only_chat)][only_chat]))


def test_one_half_of_a_shared_concept_is_not_the_concept() -> None:
    cc = planted()
    shared = WORLD.truth.shared.nonzero().flatten()
    with torch.no_grad():
        cc.weights[0].decoder[: WORLD.truth.num_concepts, : WORLD.sources.widths[0]] = 0
    assert torch.allclose(cosines(cc, WORLD.truth)[shared, shared], torch.full((len(shared),), 0.5**0.5), atol=0.07)


def test_a_decoder_that_is_not_a_number_is_refused() -> None:
    similarity = torch.rand(5, 4)
    similarity[2, 1] = torch.nan
    with pytest.raises(NonFiniteActivations, match="that are numbers"):
        match(similarity)


def test_unknown_sources_are_refused() -> None:
    cc = Crosscoder(acausal(SourceSet([Source("other", "embed", 4)]), num_latents=4), TopK(1))
    with pytest.raises(SourceMismatch, match="truth is not known"):
        cosines(cc, WORLD.truth)
