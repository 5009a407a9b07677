"""Exemplars in one pass equal a search through the whole dense code; windows hold the values around the maximum."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from crosscoder.activations import Batch, Rows
from crosscoder.analysis.exemplars import Entries, Exemplars
from crosscoder.analysis.passes import watch
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.analysis.tokens import exemplar_table, token_pieces
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import DocumentId, Encoder, assemble
from crosscoder.capture.text import Document
from crosscoder.codes import SparseCode
from crosscoder.errors import SourceMismatch

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows


def test_windows_by_hand() -> None:
    """One latent over one context of positions 1 to 5: the maximum, its neighbours, and NaN beyond the ends."""
    f = torch.tensor([[0.0], [2.0], [3.0], [0.0], [1.0]])
    rows = Rows(torch.zeros(5, dtype=torch.int64), torch.arange(1, 6), torch.full((5,), 3, dtype=torch.int8))
    found = Exemplars(1, num_exemplars=2, before=3, after=2)
    found.update(Batch(torch.zeros(5, 1), rows), SparseCode.from_dense(f))
    entry = found.entries
    assert (entry.context.tolist(), entry.position.tolist(), entry.role.tolist()) == ([0], [3], [3])
    np.testing.assert_array_equal(entry.window, [[np.nan, 0, 2, 3, 0, 1]])
    far = Exemplars(1, before=0, after=4)
    far.update(Batch(torch.zeros(5, 1), rows), SparseCode.from_dense(f))
    np.testing.assert_array_equal(far.entries.window, [[3, 0, 1, np.nan, np.nan]])


@pytest.mark.parametrize("num_exemplars", [1, 3, 100])
def test_one_pass_equals_the_whole_code(num_exemplars: int) -> None:
    """The k best contexts of every latent, each with its maximum, in order."""
    cc = random_crosscoder()
    rows = regular_rows(num_contexts=30, length=7)
    x = random_rows(cc.sources, len(rows.context))
    found = Exemplars(cc.num_latents, num_exemplars=num_exemplars, before=2, after=1)
    watch(cc, ListedActivations(cc.sources, x, rows), [found])
    dense = cc.encode(x).to_dense().detach().double().view(30, 6, cc.num_latents)
    for latent in range(cc.num_latents):
        peak, place = dense[:, :, latent].max(1)
        best = sorted((c for c in range(30) if peak[c] > 0), key=lambda c: (-float(peak[c]), c))[:num_exemplars]
        mine = np.flatnonzero(found.entries.latent == latent)
        assert found.entries.context[mine].tolist() == best
        assert found.entries.position[mine].tolist() == [int(place[c]) + 1 for c in best]
        assert found.entries.rank[mine].tolist() == list(range(len(best)))
        for entry, context in zip(mine, best, strict=True):
            around = [int(place[context]) + offset for offset in (-2, -1, 0, 1)]
            wanted = [float(dense[context, p, latent]) if 0 <= p < 6 else np.nan for p in around]
            np.testing.assert_allclose(found.entries.window[entry], wanted, rtol=1e-6)


def test_rows_that_do_not_say_where_they_lie_are_refused() -> None:
    """Without places there are no exemplars."""
    cc = random_crosscoder()
    with pytest.raises(SourceMismatch, match="where each row lies"):
        watch(cc, ListedActivations(cc.sources, random_rows(cc.sources, 8)), [Exemplars(cc.num_latents)])


def test_the_table_holds_the_windows_cut_to_their_contexts(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """Vectorised windows equal those cut one by one; every token of the vocabulary is decoded once."""
    encoder = Encoder(toy_tokenizer, ("bos", "pad"))
    documents = [Document.of(f"the old house {'stood ' * n}at the end of the lane", dataset="toy") for n in range(1, 9)]
    tokens = [(encoder.encode(d, separator=False), DocumentId(d.hash, "toy")) for d in documents]
    text = AnalysisSet.of([assemble(encoder.opening(), [part]) for part in tokens], vocabulary="toy")
    generator = np.random.default_rng(0)
    context = np.repeat(np.arange(8), 5)
    length = text.pointers.diff().numpy()[context]
    position = (generator.random(40) * length).astype(np.int64)
    window = generator.random((40, 9)).astype(np.float32)
    window[generator.random((40, 9)) < 0.2] = np.nan
    role = np.zeros(40, dtype=np.int64)
    entries = Entries(np.arange(40), context, position, role, window[:, 6].astype(float), window)
    rows = exemplar_table(entries, text, toy_tokenizer, before=6).to_pylist()
    for e, row in enumerate(rows):
        first, last = max(0, position[e] - 6), min(length[e], position[e] + 3)
        start = int(text.pointers[context[e]])
        ids = text.token_ids[start + first : start + last].tolist()
        assert (row["first_position"], row["token_ids"]) == (first, ids)
        assert row["pieces"] == [token_pieces(toy_tokenizer, ids)[token] for token in ids]
        cut = window[e, first - position[e] + 6 : last - position[e] + 6].tolist()
        assert row["values"] == [None if value != value else value for value in cut]


def test_a_batch_touches_only_its_own_latents() -> None:
    """With many latents held, a batch in which one is active costs what that one costs."""
    num_latents = 200_000
    found = Exemplars(num_latents, num_exemplars=10, before=1, after=1)
    rows = Rows(torch.tensor([0]), torch.tensor([1]), torch.tensor([0], dtype=torch.int8))
    found.update(Batch(torch.zeros(1, 1), rows), SparseCode.from_dense(torch.ones(1, num_latents)))
    start = time.process_time()
    for number in range(1, 200):
        rows = Rows(torch.tensor([number]), torch.tensor([1]), torch.tensor([0], dtype=torch.int8))
        code = SparseCode(torch.tensor([0, 1]), torch.tensor([7]), torch.tensor([float(number)]), num_latents)
        found.update(Batch(torch.zeros(1, 1), rows), code)
    assert time.process_time() - start < 2
    assert found.entries.context[found.entries.latent == 7].tolist() == list(range(199, 189, -1))


def test_statistics_equal_the_dense_code() -> None:
    """Density, density per role, mean and maximum of active values, norms in both spaces."""
    cc = random_crosscoder((6, 3))
    rows = regular_rows(num_contexts=20, length=9)
    x = random_rows(cc.sources, len(rows.context))
    statistics = LatentStatistics(cc.num_latents)
    watch(cc, ListedActivations(cc.sources, x, rows), [statistics])
    table = statistics.table(cc)
    dense = cc.encode(x).to_dense().detach().double().numpy()
    active = dense > 0
    user = rows.role.numpy() == 2
    np.testing.assert_allclose(table["density"].to_numpy(), active.mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["density_user"].to_numpy(), active[user].mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["max_value"].to_numpy(), dense.max(0), rtol=1e-6)
    mean = dense.sum(0) / np.maximum(1, active.sum(0))
    np.testing.assert_allclose(table["mean_value"].to_numpy(), mean, rtol=1e-6)
    assert table["dead"].to_pylist() == (~active.any(0)).tolist()
    raw = cc.weights[0].decoder.detach()[:, 6:].norm(dim=1) / 2.0
    np.testing.assert_allclose(table["norm_raw/chat/embed"].to_numpy(), raw.numpy(), rtol=1e-6)
