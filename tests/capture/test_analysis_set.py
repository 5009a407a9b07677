"""The analysis set: saving, checking, and finding a document's characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from capture.texts import dialogue, text_config, write_jsonl
from conftest import toy_texts
from crosscoder.capture import AnalysisSet, Corpus, DatasetConfig, Document, HeldOutConfig, render
from crosscoder.errors import FileFormatError


@pytest.fixture(params=["contiguous", "document"])
def analysis(request: pytest.FixtureRequest, tmp_path: Path, toy_tokenizer: hf.PreTrainedTokenizerFast) -> AnalysisSet:
    chats = [dialogue(text[:40], text[40:90]) for text in toy_texts(40)]
    data = DatasetConfig(
        dataset=str(write_jsonl(tmp_path / "a.jsonl", "messages", chats)), column="messages", chat=True
    )
    held_out = HeldOutConfig(fraction=0.4, num_tokens=10**6)
    return Corpus(text_config(data, packing=request.param, held_out=held_out), toy_tokenizer, seed=0).held_out()


def test_saved_and_loaded(analysis: AnalysisSet, tmp_path: Path) -> None:
    analysis.save(tmp_path / "analysis")
    loaded = AnalysisSet.load(tmp_path / "analysis")
    for name in ("pointers", "token_ids", "roles", "document", "char_start", "char_end", "kept"):
        assert torch.equal(getattr(loaded, name), getattr(analysis, name))
    assert loaded.documents == analysis.documents and loaded.vocabulary == analysis.vocabulary
    content = json.loads((tmp_path / "analysis/set.json").read_text(encoding="utf-8"))
    assert content["format"] == "crosscoder.analysis/1"


def test_other_tokens_are_refused(analysis: AnalysisSet, tmp_path: Path) -> None:
    analysis.save(tmp_path)
    content = json.loads((tmp_path / "set.json").read_text(encoding="utf-8"))
    (tmp_path / "set.json").write_text(json.dumps(content | {"hash": "0" * 32}), encoding="utf-8")
    with pytest.raises(FileFormatError, match="not those the analysis set was saved with"):
        AnalysisSet.load(tmp_path)
    (tmp_path / "set.json").write_text(json.dumps(content | {"format": "crosscoder.analysis/2"}), encoding="utf-8")
    with pytest.raises(FileFormatError, match="newer version"):
        AnalysisSet.load(tmp_path)


def test_every_character_is_found(analysis: AnalysisSet, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    for text in toy_texts(40):
        document = Document.of(dialogue(text[:40], text[40:90]), dataset="")
        if document.hash not in {known.hash for known in analysis.documents}:
            assert len(analysis.locate(document.hash, (0, 1000)).context) == 0
            continue
        rendered = render(document, toy_tokenizer)
        for start, end, role in rendered.spans:
            found = analysis.locate(document.hash, (start, end))
            tokens = analysis.pointers[found.context] + found.position
            assert toy_tokenizer.decode(analysis.token_ids[tokens]) == rendered.text[start:end]
            assert set(analysis.roles[tokens].tolist()) == {{"user": 2, "assistant": 3}[role]}


def test_a_span_takes_every_token_it_touches(analysis: AnalysisSet) -> None:
    known = analysis.documents[0].hash
    tokens = (analysis.document == 0).nonzero().squeeze(-1)
    chosen = tokens[(analysis.char_end - analysis.char_start)[tokens] > 1][3]
    start, end = int(analysis.char_start[chosen]), int(analysis.char_end[chosen])
    for span in ((start, end), (start, start + 1), (end - 1, end)):
        found = analysis.locate(known, span)
        assert (analysis.pointers[found.context] + found.position).tolist() == [int(chosen)]
    assert len(analysis.locate(known, (start - 1, end + 1)).context) >= 2


def test_contexts_come_back(analysis: AnalysisSet) -> None:
    lengths = [len(context) for context in analysis]
    assert sum(lengths) == analysis.num_tokens and len(lengths) == analysis.num_contexts
    assert max(lengths) == analysis.context_length
    assert all(context.tokens.ids[0] == 1 for context in analysis)
