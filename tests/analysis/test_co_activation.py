"""Co-activation by hand, against the dense code, by context; and the pairs that twins and searches give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscoder.activations import Batch, Rows
from crosscoder.analysis import co_activation
from crosscoder.analysis.classes import Twins, twins
from crosscoder.analysis.co_activation import CoActivation, CoActivationSums, in_units
from crosscoder.analysis.firing_pairs import FIRING, co_firing, twin_firing
from crosscoder.analysis.firing_signatures import FiringSignatures
from crosscoder.analysis.passes import watch
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.nonlinearities import ReLU
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import acausal

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows


def counted(f: torch.Tensor, pairs: list[tuple[int, int]], *, parts: int = 1) -> CoActivation:
    """The counts of pairs over a dense code."""
    a, b = (torch.tensor([pair[n] for pair in pairs]) for n in (0, 1))
    sums = CoActivationSums(a, b, max_values=f.amax(0))
    for part in f.tensor_split(parts):
        sums.update(Batch(torch.zeros(len(part), 1)), SparseCode.from_dense(part))
    return sums.result


def test_a_pair_by_hand() -> None:
    """Rows: both strong; a strong and b weak; a strong alone; b middling alone; none."""
    f = torch.tensor([[10.0, 5.0], [9.0, 0.5], [8.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    found = counted(f, [(0, 1)])
    assert (found.num_a.item(), found.num_b.item(), found.num_both.item()) == (3, 3, 2)
    assert found.jaccard.item() == 0.5 and found.overlap.item() == pytest.approx(2 / 3)
    assert found.lift.item() == pytest.approx(2 * 5 / 9)
    # high: a on rows 0 to 2, b on row 0 (its 2 is 0.4 of 5, not above); a alone on rows 1 and 2 (b at most a tenth)
    assert (found.num_high.item(), found.num_only.item()) == (3, 2)
    assert found.divergence.item() == pytest.approx(2 / 3)


def published_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """The code of Minder et al. (twins_activation_analysis), written out: buckets, highs, onlys."""
    edges = [1e-6, 0.1, 0.4, 0.7]
    bucket_a, bucket_b = (np.digitize(f / f.max(), edges, right=True) for f in (a, b))
    only_a, only_b = (bucket_a >= 3) & (bucket_b <= 1), (bucket_b >= 3) & (bucket_a <= 1)
    both = (bucket_a >= 3) & (bucket_b >= 3)
    union = (bucket_a >= 3).sum() + (bucket_b >= 3).sum() - both.sum()
    return float((only_a.sum() + only_b.sum()) / union)


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("at_once", [5, 2**20])
def test_counts_equal_the_dense_code(parts: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair, the same one twice, and pairs with themselves; in any batches and any chunks."""
    monkeypatch.setattr(co_activation, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    f = torch.relu(torch.randn(300, 6, generator=generator).double())
    pairs = [(i, j) for i in range(6) for j in range(5, -1, -1)] + [(2, 3)]
    found = counted(f, pairs, parts=parts)
    assert list(zip(found.latents_a.tolist(), found.latents_b.tolist(), strict=True)) == pairs
    dense = f.numpy()
    for n, (i, j) in enumerate(pairs):
        a, b = dense[:, i], dense[:, j]
        assert found.num_both[n] == ((a > 0) & (b > 0)).sum()
        assert found.jaccard[n].item() == pytest.approx(((a > 0) & (b > 0)).sum() / ((a > 0) | (b > 0)).sum())
        assert found.correlation[n].item() == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-9)
        assert found.divergence[n].item() == pytest.approx(published_divergence(a, b))


def test_silence_has_no_share() -> None:
    """A latent that is never active: null, not zero."""
    row = counted(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), [(0, 1)]).table().to_pylist()[0]
    assert row["correlation"] is None and row["overlap"] is None and row["jaccard"] == 0 and row["num_b"] == 0


def test_by_context_each_latent_counts_once() -> None:
    """Two contexts, the second apart by row and together by context."""
    rows = Rows(torch.tensor([4, 4, 9, 9]), torch.arange(4), torch.zeros(4, dtype=torch.int8))
    f = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    code = in_units(Batch(torch.zeros(4, 1), rows), SparseCode.from_dense(f), "context")
    assert code.to_dense().tolist() == [[3.0, 0.0], [2.0, 5.0]]
    with pytest.raises(SourceMismatch, match="where each row lies"):
        in_units(Batch(torch.zeros(4, 1)), SparseCode.from_dense(f), "context")


def test_pairs_that_are_not_there_are_refused() -> None:
    """Out of range, and of unequal number."""
    with pytest.raises(ConfigError, match="from 0 to 2; got 3"):
        CoActivationSums(torch.tensor([0]), torch.tensor([3]), max_values=torch.ones(3))
    with pytest.raises(ConfigError, match="as many latents"):
        CoActivationSums(torch.tensor([0]), torch.tensor([1, 2]), max_values=torch.ones(3))


def test_signatures_estimate_the_jaccard_index() -> None:
    """Within four standard errors for every pair of 30 latents; batches do not matter; the silent agree with none."""
    generator = torch.Generator().manual_seed(3)
    f = (torch.rand(4000, 30, generator=generator) < 0.02).float()
    for i in range(0, 28, 2):  # each even latent and the next share a growing part
        f[: 4000 * i // 28, i + 1] = f[: 4000 * i // 28, i]
    f[:, 29] = 0
    everyone = torch.arange(30)
    signatures = [FiringSignatures(everyone, num_latents=30, num_hashes=256) for _ in range(2)]
    signatures[0].update(Batch(torch.zeros(4000, 1)), SparseCode.from_dense(f))
    for part in f.split(333):
        signatures[1].update(Batch(torch.zeros(len(part), 1)), SparseCode.from_dense(part))
    found, again = (s.similar(everyone, everyone, jaccard=0.0) for s in signatures)
    assert found.jaccard.tolist() == again.jaccard.tolist()
    estimate = torch.zeros(30, 30)
    estimate[found.latents_a, found.latents_b] = found.jaccard
    active = f > 0
    both = active.T.float() @ active.float()
    union = active.sum(0)[:, None] + active.sum(0) - both
    true = both / union.clamp(min=1)
    true.fill_diagonal_(0)
    error = (true * (1 - true) / 256).sqrt().clamp(min=1e-3)
    assert bool(((estimate - true).abs() <= 4.5 * error + 0.01).all())
    assert not (found.latents_a == 29).any()


def planted_pair() -> tuple[Crosscoder, ListedActivations]:
    """Latents 0 and 1 (a-only, b-only, one direction): same rows. 2 and 3: one direction, other rows.

    4 and 5: same rows, two directions. A concept of each pair has an input column of its own, which makes rows.
    """
    sources = SourceSet([Source("a", "embed", 6), Source("b", "embed", 6)])
    cc = Crosscoder(acausal(sources, num_latents=6), ReLU(), seed=None)
    eye = torch.eye(6)
    with torch.no_grad():
        encoder, decoder = cc.weights[0].encoder, cc.weights[0].decoder
        encoder[:, :6] = eye[[0, 0, 1, 2, 3, 3]]
        cc.weights[0].encoder_bias.fill_(-0.5)
        for latent, direction in enumerate([0, 0, 1, 1, 2, 3]):
            side = latent % 2
            decoder[latent, 6 * side + direction] = 1.0
    cc.refresh_gate()
    x = torch.zeros(400, 12)
    for row in range(400):
        x[row, row % 4] = 1.0 + row / 400
    rows = regular_rows(num_contexts=20, length=21)
    return cc, ListedActivations(sources, x, rows)


def test_twins_are_split_or_decoupled() -> None:
    """Same rows: one concept counted twice. Other rows: decoupled. A pass for the largest values changes nothing."""
    cc, activations = planted_pair()
    pairs = twins(cc, a="a", b="b")
    found = twin_firing(cc, activations, pairs)
    rows = {(row["latent_a"], row["latent_b"]): row for row in found.table().to_pylist()}
    assert set(rows) == {(0, 1), (2, 3)}
    assert rows[0, 1]["split"] and not rows[0, 1]["decoupled"] and rows[0, 1]["divergence"] == 0
    assert rows[2, 3]["decoupled"] and rows[2, 3]["divergence"] == 1 and rows[2, 3]["firing"] == "apart"
    assert (found.to_json()["num_split"], found.to_json()["num_decoupled"]) == (1, 1)
    known = twin_firing(cc, activations, pairs, max_values=cc.encode(activations.x).to_dense().amax(0).detach())
    assert known.table().equals(found.table())
    by_context = twin_firing(cc, activations, pairs, unit="context")
    assert by_context.firing_ids.tolist() == [FIRING.index("together")] * 2


def test_the_search_finds_who_fires_together_whatever_the_direction() -> None:
    """Pairs 0:1 and 4:5 of all nine, exact counts, cosines 1 and 0."""
    cc, activations = planted_pair()
    sides = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
    found = co_firing(cc, activations, sides, a="a", b="b")
    rows = [(r["latent_a"], r["latent_b"], r["cosine"], r["split"]) for r in found.table().to_pylist()]
    assert sorted(rows) == [(0, 1, 1.0, True), (4, 5, 0.0, False)]
    assert found.counts.jaccard.tolist() == [1.0, 1.0] and found.counts.num_both.tolist() == [100, 100]
    assert co_firing(cc, activations, (sides[0][1:2], sides[1]), a="a", b="b").table().num_rows == 0


def test_the_search_misses_nothing_above_the_cut() -> None:
    """A random crosscoder: all pairs of the dense code with at least the cut, and no others."""
    cc = random_crosscoder(num_latents=60, nonlinearity=ReLU())
    rows = regular_rows(num_contexts=40, length=26)
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 1000), rows)
    active = (cc.encode(activations.x).to_dense() > 0).double()
    both = active.T @ active
    true = both / (active.sum(0)[:, None] + active.sum(0) - both)
    first, second = torch.arange(30), torch.arange(30, 60)
    found = co_firing(cc, activations, (first, second), a="base", b="chat", jaccard=0.6)
    wanted = {(i, j) for i in range(30) for j in range(30, 60) if true[i, j] >= 0.6}
    there = set(zip(found.counts.latents_a.tolist(), found.counts.latents_b.tolist(), strict=True))
    assert there <= wanted and len(there) >= 0.97 * len(wanted) > 5
    assert found.counts.jaccard.tolist() == sorted(found.counts.jaccard.tolist(), reverse=True)


def test_rare_pairs_say_nothing() -> None:
    """Five rows are too few to call a pair apart; no pairs at all are no error."""
    cc, activations = planted_pair()
    short = ListedActivations(activations.sources, activations.x[:20])
    found = twin_firing(cc, short, twins(cc, a="a", b="b"))
    assert found.firing_ids.tolist() == [FIRING.index("rare")] * 2 and not found.decoupled.any()
    empty = torch.zeros(0, dtype=torch.int64)
    none = twin_firing(cc, activations, Twins("a/embed", "b/embed", empty, empty, torch.zeros(0)))
    assert none.table().num_rows == 0 and none.to_json()["median_jaccard"] is None


def test_unequal_widths_have_no_cosine() -> None:
    """Firing can be compared where directions cannot."""
    cc = random_crosscoder((6, 3), nonlinearity=ReLU())
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 300))
    found = co_firing(cc, activations, (torch.arange(10), torch.arange(10, 20)), a="base", b="chat", jaccard=0.2)
    assert found.cosine is None and found.table()["cosine"].null_count == found.table().num_rows > 0
    assert not found.split.any()
    sums = CoActivationSums(torch.tensor([0]), torch.tensor([1]), max_values=torch.ones(20))
    watch(cc, activations, [sums])
    assert sums.result.num_units == 300
