"""Clusters of exemplars on planted latents that fire on one concept or on two, and the comparison of classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscoder.analysis.class_comparison import compare, exclusive_against_shared
from crosscoder.analysis.classes import latent_classes
from crosscoder.analysis.exemplar_vectors import exemplar_vectors
from crosscoder.analysis.exemplars import Entries, Exemplars
from crosscoder.analysis.passes import watch
from crosscoder.analysis.polysemanticity import average_linkage, polysemanticity
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.nonlinearities import ReLU
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import acausal

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows

WIDTH = 24
READS = [[n] for n in range(6)] + [[n, n + 6] for n in range(6, 12)] + [[18, 19, 20], [21, 22, 23]]


def planted(*, folded: bool = False) -> tuple[Crosscoder, ListedActivations]:
    """Latents 0 to 5 read one concept each, 6 to 11 two, 12 to 13 three; concepts at right angles; odd latents of a.

    A row has one of these concepts, about three of 24 that no latent reads, noise, and a mean that all rows share.
    """
    sources = SourceSet([Source("a", "embed", WIDTH), Source("b", "embed", WIDTH)])
    generator = torch.Generator().manual_seed(0)
    concepts = torch.linalg.qr(torch.randn(2 * WIDTH, 2 * WIDTH, generator=generator)).Q
    cc = Crosscoder(acausal(sources, num_latents=len(READS)), ReLU(), seed=None)
    with torch.no_grad():
        for latent, own in enumerate(READS):
            cc.weights[0].encoder[latent] = concepts[own].sum(0)
            cc.weights[0].decoder[latent] = concepts[own].sum(0)[:WIDTH].repeat(2)
            if latent % 2:
                cc.weights[0].decoder[latent, WIDTH:] = 0
        cc.weights[0].encoder_bias.fill_(-1.0)
    cc.refresh_gate()
    rows = regular_rows(num_contexts=200, length=16)
    number = len(rows.context)
    which = torch.randint(24, (number,), generator=generator)
    x = (1.5 + torch.rand(number, 1, generator=generator)) * concepts[which]
    others = (torch.rand(number, 24, generator=generator) < 0.12) * torch.rand(number, 24, generator=generator)
    x = x + others @ concepts[24:] + 0.05 * torch.randn(number, 2 * WIDTH, generator=generator)
    mean, scale = 10 * torch.randn(2 * WIDTH, generator=generator), torch.tensor([0.5, 4.0])
    cc.set_normaliser(mean, scale)
    raw = x / scale.repeat_interleave(WIDTH) + mean
    return (cc.folded() if folded else cc), ListedActivations(sources, raw, rows)


def exemplars_of(cc: Crosscoder, activations: ListedActivations, **sizes: int) -> tuple[Entries, torch.Tensor]:
    found = Exemplars(cc.num_latents, **{"num_exemplars": 12, "before": 2, "after": 1} | sizes)
    watch(cc, activations, [found])
    return found.entries, exemplar_vectors(cc, activations, found.entries)


@pytest.mark.parametrize("folded", [False, True])
def test_one_concept_is_one_cluster_and_two_are_two(folded: bool) -> None:
    """The number of clusters is the number of concepts; similarity falls with it."""
    entries, vectors = exemplars_of(*planted(folded=folded))
    found = polysemanticity(vectors, entries)
    assert found.latents.tolist() == list(range(14)) and set(found.num_exemplars.tolist()) == {12}
    assert found.clusters.tolist() == [1] * 6 + [2] * 6 + [3] * 2
    assert found.effective_clusters[:6].tolist() == pytest.approx([1.0] * 6)
    assert bool((found.effective_clusters[6:12] > 1.3).all())
    assert found.similarity[:6].min() > 0.8 > 0.7 > found.similarity[6:].max()
    assert found.to_json()["num_latents_by_clusters"] == [0, 6, 6, 2]
    assert found.table().column_names == ["latent", "num_exemplars", "similarity", "clusters", "effective_clusters"]


def test_vectors_by_the_definition() -> None:
    """The normalised row at every peak; rows that do not say where they lie are refused."""
    cc = random_crosscoder((5, 3))
    rows = regular_rows(num_contexts=11, length=9)
    activations = ListedActivations(cc.sources, random_rows(cc.sources, len(rows.context)), rows)
    entries, vectors = exemplars_of(cc, activations, num_exemplars=3)
    x = cc.normalise(activations.x)
    for e in range(len(entries.latent)):
        peak = (rows.context == int(entries.context[e])) & (rows.position == int(entries.position[e]))
        torch.testing.assert_close(vectors[e], x[peak][0])
    one_batch = ListedActivations(cc.sources, activations.x)
    with pytest.raises(SourceMismatch, match="where they lie"):
        exemplar_vectors(cc, one_batch, entries)


def linked(similarity: np.ndarray, cut: float) -> list[int]:
    """Average linkage written out: merge the two clusters with the largest mean similarity."""
    clusters = [[n] for n in range(len(similarity))]
    while len(clusters) > 1:
        means = {
            (i, j): np.mean([similarity[p, q] for p in clusters[i] for q in clusters[j]])
            for i in range(len(clusters))
            for j in range(i)
        }
        (i, j), best = max(means.items(), key=lambda item: item[1])
        if best <= cut:
            break
        clusters[j] += clusters.pop(i)
    return sorted(len(cluster) for cluster in clusters)


@pytest.mark.parametrize("cut", [-0.2, 0.0, 0.3, 2.0])
def test_linkage_equals_the_definition(cut: float) -> None:
    """Random similarities of unequally many exemplars."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(20, 9, 4, generator=generator).double(), dim=2)
    similarity = unit @ unit.transpose(1, 2)
    counts = torch.arange(20) % 9 + 1
    there = torch.arange(9) < counts[:, None]
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(9, dtype=torch.bool)
    sizes = average_linkage(similarity.masked_fill(~pairs, -torch.inf), there, cut)
    for latent, number in enumerate(counts.tolist()):
        mine = sorted(int(size) for size in sizes[latent].tolist() if size)
        assert mine == linked(similarity[latent, :number, :number].numpy(), cut)


def test_too_few_exemplars_have_no_number() -> None:
    """NaN, and null in the table; without strangers a cut must be given; no entries are no error with one."""
    cc, activations = planted()
    entries, vectors = exemplars_of(cc, activations)
    own = np.flatnonzero((entries.latent == 3) | ((entries.latent == 6) & (entries.rank < 4)))
    found = polysemanticity(vectors[torch.from_numpy(own)], entries.take(own), cut=0.5)
    assert found.clusters[0] == 1 and found.clusters[1].isnan()
    assert found.table()["similarity"].to_pylist()[1] is None
    alone = np.flatnonzero(entries.latent == 3)
    with pytest.raises(TextError, match="several latents"):
        polysemanticity(vectors[torch.from_numpy(alone)], entries.take(alone))
    none = np.zeros(0, dtype=np.int64)
    assert polysemanticity(vectors[:0], entries.take(none), cut=0.5).to_json()["num_latents"] == 0


def test_classes_are_compared() -> None:
    """Exclusive latents (odd ones) fire as shared ones do; clusters are those of the plant."""
    cc, activations = planted()
    entries, vectors = exemplars_of(cc, activations)
    density = (cc.encode(activations.x).to_dense() > 0).double().mean(0)
    classes = latent_classes(cc, a="a", b="b", density=density)
    found = exclusive_against_shared(classes, density=density, polysemanticity=polysemanticity(vectors, entries))
    assert (found.density.num_exclusive, found.density.num_shared) == (7, 7)
    assert found.clusters is not None and found.clusters.low < 1 < found.clusters.high and found.clusters.p_value > 0.2
    assert found.table()["quantity"].to_pylist() == ["density", "clusters", "similarity"]
    assert exclusive_against_shared(classes, density=density).clusters is None


def test_a_comparison_by_hand_and_its_test() -> None:
    """Ratio and p of small sets by going through all deals; a real gap is found, none is not."""
    values = torch.tensor([4.0, 6.0, 1.0, 2.0, 3.0, torch.nan])
    one = torch.tensor([True, True, False, False, False, True])
    found = compare(values, one, ~one, quantity="density", num_draws=4000)
    assert (found.num_exclusive, found.num_shared, found.ratio) == (2, 3, 2.5)
    # of the 10 deals of two out of five, only {4, 6} is 3 apart from the rest
    assert found.p_value == pytest.approx(0.1, abs=0.02)
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(400, generator=generator).exp()
    group = torch.arange(400) < 60
    same = compare(many, group, ~group, quantity="density", statistic="median")
    more = compare(many * (1 + 2 * group), group, ~group, quantity="density", statistic="median")
    assert same.p_value > 0.05 and same.low < 1 < same.high
    assert more.p_value < 0.002 and more.low > 1.5 and 2 < more.ratio < 4.5
    turned = compare(many, ~group, group, quantity="density", statistic="median")
    assert turned.ratio == pytest.approx(1 / same.ratio)


def test_an_empty_class_leaves_the_ratio_open() -> None:
    """Null, not zero."""
    cc = random_crosscoder()
    classes = latent_classes(cc, a="base", b="chat")
    density = torch.full((20,), 0.1).double()
    found = exclusive_against_shared(classes, density=density)
    assert found.density.num_exclusive == 0 and found.density.ratio != found.density.ratio
    assert found.table().to_pylist()[0]["p_value"] is None and found.density.shared == pytest.approx(0.1)
