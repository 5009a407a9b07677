"""Labels: the file, the tokens they fall on, and scores against planted truth and brute force."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from crosscoder.activations import ROLES, Rows
from crosscoder.analysis.label_scores import LabelScores, choosing_half, label_scores
from crosscoder.analysis.labelled_rows import labelled_rows, select_rows
from crosscoder.analysis.labels import LabelSpan, locate_labels, read_labels
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import DocumentId, Encoder, assemble
from crosscoder.capture.text import Document
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError, SourceMismatch, TextError
from crosscoder.nonlinearities import ReLU
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import acausal, sae

from .worlds import ListedActivations

HEAD = '{"format": "crosscoder.labels/1"}\n'
WIDTH = 8


@pytest.fixture
def text(toy_tokenizer: PreTrainedTokenizerFast) -> AnalysisSet:
    """24 dialogues: a question with a marked word, an answer; marked `open` or `shut`."""
    encoder = Encoder(toy_tokenizer, ("bos", "pad"))
    contexts = []
    for document in documents():
        tokens = encoder.encode(document, separator=False)
        contexts.append(assemble(encoder.opening(), [(tokens, DocumentId(document.hash, "toy"))]))
    return AnalysisSet.of(contexts, vocabulary="toy")


def documents() -> list[Document]:
    """Even ones say `open`, odd ones `shut`."""
    turns = [
        [
            {"role": "user", "content": f"is the house number {n} {'open' if n % 2 == 0 else 'shut'} ?"},
            {"role": "assistant", "content": "the door is brown"},
        ]
        for n in range(24)
    ]
    return [Document.of(messages, dataset="toy") for messages in turns]


def spans(tokenizer: PreTrainedTokenizerFast) -> list[LabelSpan]:
    """The marked word of every document, and the whole of it (template tokens too) under another label."""
    found = []
    for n, document in enumerate(documents()):
        rendered = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in document.content], tokenize=False
        )
        start = rendered.index("open" if n % 2 == 0 else "shut")
        found.append(LabelSpan(context=document.hash, span=(start, start + 4), label="open", value=n % 2 == 0))
        found.append(LabelSpan(context=document.hash, span=(0, len(rendered)), label="whole", value=n % 2 == 0))
    return found


def world(text: AnalysisSet, values: np.ndarray, *, seed: int = 0) -> tuple[ListedActivations, Crosscoder, Crosscoder]:
    """Noise at sources base and chat with a concept in chat where `values` is 1; the crosscoder's latent 5 reads it.

    The baseline reads base alone, where nothing tells.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = text.kept.nonzero().squeeze(1)
    context = torch.searchsorted(text.pointers, kept, right=True) - 1
    rows = Rows(context, kept - text.pointers[context], text.roles[kept].long())
    x = 0.1 * torch.randn(len(kept), 2 * WIDTH, generator=generator)
    x[:, WIDTH] += 3 * torch.tensor(values[kept.numpy()] == 1)
    sources = SourceSet([Source("base", "embed", WIDTH), Source("chat", "embed", WIDTH)])
    cc = Crosscoder(acausal(sources, num_latents=12), ReLU()).eval()
    baseline = Crosscoder(sae(sources["base/embed"], num_latents=6), ReLU()).eval()
    with torch.no_grad():
        cc.weights[0].encoder[:, WIDTH] = 0.0
        cc.weights[0].encoder[5].zero_()[WIDTH] = 1.0
    return ListedActivations(sources, x, rows), cc, baseline


def test_spans_fall_on_the_tokens_that_share_characters(
    text: AnalysisSet, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every token of the marked word and no other, true or false as written."""
    located = locate_labels(spans(toy_tokenizer), text)
    assert located.names == ("open", "whole") and located.num_documents == 24 and located.num_absent == 0
    for n, context in enumerate(text):
        part = located.values[0, int(text.pointers[n]) : int(text.pointers[n + 1])]
        marked = toy_tokenizer.decode(context.tokens.ids[part != 0])
        assert ("open" if n % 2 == 0 else "shut") in marked and len(marked) <= 5
        assert set(part[part != 0]) == {1 if n % 2 == 0 else -1}


def test_the_planted_latent_is_found_and_only_by_those_who_can(
    text: AnalysisSet, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Latent 5 has AUROC 1; the baseline on base cannot tell; both directions in chat can."""
    located = locate_labels(spans(toy_tokenizer), text)
    activations, cc, baseline = world(text, located.values[0])
    found = label_scores(cc, activations, text, labels=spans(toy_tokenizer), a="base", b="chat", baseline=baseline)
    label = found.labels[0]
    assert (label.label, label.roles, label.num_documents) == ("open", ("user",), 12)
    by_name = {score.detector: score for score in label.scores}
    chance = by_name["baseline latent"]
    assert by_name["latent"].latent == 5 and label.best_latent == by_name["latent"]
    assert (by_name["latent"].auroc, by_name["latent"].auroc_low, by_name["latent"].f1) == (1.0, 1.0, 1.0)
    assert chance.auroc < 0.9 and chance.auroc_low < chance.auroc < chance.auroc_high
    assert by_name["difference of means, b"].auroc == 1.0 and by_name["mean difference"].auroc > 0.95
    assert by_name["difference of means, a"].auroc < 0.95
    assert found.table().num_rows == 10 and json.dumps(found.to_json())


def test_a_choice_by_luck_does_not_survive_the_other_half(
    text: AnalysisSet, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Where nothing is planted, the best of many latents looks good on the half that chose it and not on the other."""
    located = locate_labels(spans(toy_tokenizer), text)
    scores = []
    for seed in range(8):
        activations, cc, _ = world(text, np.zeros_like(located.values[0]), seed=seed)
        found = label_scores(cc, activations, text, labels=spans(toy_tokenizer), a="base", b="chat")
        best = found.labels[0].best_latent
        scores.append((best.auroc_choosing, best.auroc))
    chosen, held_out = np.mean(scores, axis=0)
    assert chosen > 0.65 and abs(held_out - 0.5) < 0.12


def test_template_tokens_never_count(text: AnalysisSet, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """The label over whole dialogues is scored on user and assistant tokens, compared within each role."""
    located = locate_labels(spans(toy_tokenizer), text)
    activations, cc, _ = world(text, located.values[0])
    whole: LabelScores = label_scores(cc, activations, text, labels=spans(toy_tokenizer), a="base", b="chat")
    label = whole.labels[1]
    assert label.roles == ("user", "assistant")
    is_speech = np.isin(text.roles.numpy(), [ROLES.index("user"), ROLES.index("assistant")])
    assert label.num_positive + label.num_negative < is_speech.sum()
    rows = labelled_rows(cc, activations, text, located=located)
    value, role = rows.values[1], rows.role
    half = ~choosing_half(rows.document, value == 1, [d.hash for d in text.documents])
    values = rows.code.to_dense().numpy()[:, label.best_latent.latent]
    wins = pairs = 0.0
    for i in np.flatnonzero((value == 1) & half & np.isin(role, [2, 3])):
        for j in np.flatnonzero((value == -1) & half & (role == role[i])):
            pairs += 1
            wins += float(values[i] > values[j]) + 0.5 * float(values[i] == values[j])
    assert label.best_latent.auroc == pytest.approx(wins / pairs, abs=1e-9)


def test_halves_are_equal_and_do_not_depend_on_order() -> None:
    """Half of the documents in which it acts, half of the others; the same under any order of rows."""
    hashes = [f"{n:032x}" for n in range(20)]
    document = np.repeat(np.arange(20), 3)
    positive = (document < 8) & (np.arange(60) % 3 == 0)
    half = choosing_half(document, positive, hashes)
    assert len(np.unique(document[half & (document < 8)])) == 4
    assert len(np.unique(document[half & (document >= 8)])) == 6
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(choosing_half(document[order], positive[order], hashes), half[order])


def test_a_binary_file_is_no_labels(tmp_path: Path) -> None:
    """An error of ours, naming the file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(FileFormatError, match="not text in UTF-8"):
        read_labels(path)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """Other separators may stand inside a JSON string."""
    path = tmp_path / "labels.jsonl"
    line = '{"context": "c", "span": [0, 1], "label": "one\u2028two\u0085", "value": true}'
    path.write_bytes((HEAD + line + "\r\n").encode())
    assert [span.label for span in read_labels(path)] == ["one\u2028two\u0085"]


def test_selecting_rows_of_a_code() -> None:
    """The same as selecting rows of the dense matrix."""
    dense = torch.relu(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    chosen = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0], dtype=bool)
    part = select_rows(SparseCode.from_dense(dense), chosen)
    torch.testing.assert_close(part.to_dense(), dense[torch.from_numpy(chosen)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a labels"),
        ('{"format": "crosscoder.labels/2"}\n', "newer version"),
        (HEAD + '{"context": "a", "span": [0, 1], "label": "x"}\n', "line 2 of"),
        (HEAD + "\n" + "not json\n", "line 3 of .* is not JSON"),
        (HEAD + "[1]\n", "not a JSON object"),
        (HEAD + '{"context": "a", "span": [0, 1], "label": "x", "value": 1}\n', "line 2 of"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    """What is wrong and where."""
    path = tmp_path / "labels.jsonl"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=message):
        read_labels(path)


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """Spans come back as written; a missing file says so."""
    path = tmp_path / "labels.jsonl"
    path.write_text(HEAD + '{"context": "a", "span": [3, 5], "label": "x", "value": true}\n')
    assert read_labels(path) == [LabelSpan(context="a", span=(3, 5), label="x", value=True)]
    with pytest.raises(FileFormatError, match="there is none"):
        read_labels(tmp_path / "none.jsonl")


def test_labels_of_other_text_and_baselines_of_other_sources_are_refused(
    text: AnalysisSet, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """No document in common, or a source that nobody reads."""
    with pytest.raises(TextError, match="none of the 1 labelled documents"):
        locate_labels([LabelSpan(context="f" * 32, span=(0, 1), label="x", value=True)], text)
    activations, cc, _ = world(text, np.zeros(text.num_tokens))
    other = Crosscoder(sae(Source("third", "embed", WIDTH), num_latents=2), ReLU())
    with pytest.raises(SourceMismatch, match="baseline reads sources"):
        label_scores(cc, activations, text, labels=spans(toy_tokenizer), a="base", b="chat", baseline=other)
