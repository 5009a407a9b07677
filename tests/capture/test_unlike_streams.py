"""The live stream of models with different tokenizers: right rows, the same after a stop, and from a saved set."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.families import build
from capture.texts import dialogue, text_config, write_jsonl
from capture.tokenizers_of_kinds import STRANGE, byte_level, pieces
from conftest import CHAT_TEMPLATE, toy_texts
from crosscoder.activations import Batch
from crosscoder.capture import ActivationStream, AnalysisSet, Corpus, DatasetConfig, HeldOutConfig, StudiedModel
from crosscoder.capture.alignment import Aligner
from crosscoder.errors import TokenizerMismatch
from crosscoder.sources import SourceSet

SITES = ("one/layers.0.resid_post", "two/layers.1.resid_post", "two/embed")


def vocabulary_of(size: int) -> hf.PreTrainedModel:
    """A GPT-2 of another width than the Llama, with learned positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=size, n_embd=24, n_layer=2, n_head=2, n_positions=40)).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, StudiedModel]:
    """A Llama with byte-level tokens and a narrower GPT-2 with sentence pieces."""
    own, other = byte_level(390), pieces()
    own.chat_template = CHAT_TEMPLATE
    return {
        "one": StudiedModel("one", build("llama").float(), own),
        "two": StudiedModel("two", vocabulary_of(len(other)), other),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Documents, some of them dialogues, some with characters of several bytes."""
    folder = tmp_path_factory.mktemp("text")
    plain = write_jsonl(folder / "a.jsonl", "text", [*toy_texts(40), *(s * 6 for s in STRANGE)])
    talk = [dialogue(f"who are you {n}", "a clock 🙂", "mend it", "no") for n in range(20)]
    chat = write_jsonl(folder / "b.jsonl", "messages", talk)
    return {"plain": plain, "chat": DatasetConfig(dataset=str(chat), column="messages", chat=True)}


def corpus(text: dict[str, Any], models: dict[str, StudiedModel], **more: Any) -> Corpus:
    settings = {"alignment": "bytes", "held_out": HeldOutConfig(fraction=0.3, num_tokens=400)} | more
    return Corpus(text_config(text["plain"], text["chat"], **settings), models["one"].tokenizer, seed=0)


def stream(models: dict[str, StudiedModel], over: Corpus | AnalysisSet, **more: Any) -> ActivationStream:
    sources = SourceSet(models[key.split("/")[0]].source(key.split("/")[1]) for key in SITES)
    return ActivationStream(models, sources, over, buffer_bytes=60_000, batch_tokens=64, seed=0, **more)


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.x, b.x)
    for name in ("context", "position", "role"):
        assert torch.equal(getattr(a.rows, name), getattr(b.rows, name))


@pytest.mark.parametrize("packing", ["contiguous", "document"])
def test_rows_are_activations_after_the_same_text(models: Any, text: Any, packing: str) -> None:
    """The row of the text's own model is what it gives at the last token up to there, alone in a batch."""
    over = corpus(text, models, packing=packing)
    contexts = list(islice(over.training(), 200))
    one = models["one"]
    for batch in islice(stream(models, over).batches(40), 4):
        by_source = stream(models, over).sources.unpack(batch.x)
        for row in range(0, 40, 4):
            number, position = int(batch.rows.context[row]), int(batch.rows.position[row])
            tokens = contexts[number].tokens
            assert batch.rows.role[row] == tokens.roles[position]
            ids = torch.from_numpy(tokens.ids[: position + 1]).long()[None]
            torch.testing.assert_close(
                by_source[SITES[0]][row], one.read(["layers.0.resid_post"], ids)["layers.0.resid_post"][0, -1]
            )


@settings(max_examples=8, deadline=None)
@given(taken=st.integers(0, 15), packing=st.sampled_from(["contiguous", "document"]))
def test_resuming_equals_never_having_stopped(models: Any, text: Any, taken: int, packing: str) -> None:
    whole = stream(models, corpus(text, models, packing=packing), passes=2)
    batches = whole.batches(37)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))
    assert len(state["settings"]["aligned"]) == 1
    resumed = stream(models, corpus(text, models, packing=packing), passes=2)
    resumed.load_state_dict(state)
    for before, after in zip(islice(batches, 9), resumed.batches(37), strict=False):
        assert_same(before, after)


def test_a_saved_set_gives_the_same_rows(models: Any, text: Any, tmp_path: Path, caplog: Any) -> None:
    """The text's own tokens are enough: the others follow, and how many were lost is in set.json and in the log."""
    over = corpus(text, models)
    with caplog.at_level(logging.INFO):
        held = over.held_out(Aligner.of(models, vocabulary=over.vocabulary))
    assert "tokens without a row: one" in caplog.text and held.aligned is not None
    held.save(tmp_path)
    again = AnalysisSet.load(tmp_path)
    assert again.aligned == held.aligned and 0 < again.aligned.lost["one"] < 1
    assert json.loads((tmp_path / "set.json").read_text())["aligned"]["lost"] == again.aligned.lost
    for made, loaded in zip(stream(models, held).contexts(), stream(models, again).contexts(), strict=True):
        assert_same(made, loaded)
    rows = sum(len(batch.x) for batch in stream(models, again).contexts())
    assert rows == int(again.kept.sum()) < int(over.held_out().kept.sum())


def test_one_model_on_an_aligned_set_reads_as_many_rows(models: Any, text: Any) -> None:
    """A baseline on one of the models sees the rows that the pair sees."""
    over = corpus(text, models)
    held = over.held_out(Aligner.of(models, vocabulary=over.vocabulary))
    alone = ActivationStream(models, SourceSet([models["one"].source("embed")]), held)
    assert sum(len(batch.x) for batch in alone.contexts()) == int(held.kept.sum())


def test_unlike_tokenizers_are_refused_unless_asked_for(models: Any, text: Any) -> None:
    with pytest.raises(TokenizerMismatch, match=r"(?s)vocabularies differ.*text\.alignment to bytes"):
        stream(models, corpus(text, models, alignment="identical"))
    with pytest.raises(TokenizerMismatch, match="vocabularies differ"):
        stream(models, corpus(text, models, alignment="identical").held_out())


def test_alike_tokenizers_are_read_as_ever(models: Any, text: Any) -> None:
    """Asking for bytes where vocabularies are the same changes not a bit, and no place."""
    pair = {"one": models["one"], "two": StudiedModel("two", models["one"].model, models["one"].tokenizer)}
    asked, plain = (stream(pair, corpus(text, pair, alignment=choice)) for choice in ("bytes", "identical"))
    for a, b in zip(islice(asked.batches(50), 4), plain.batches(50), strict=False):
        assert_same(a, b)
    assert asked.state_dict() == plain.state_dict()


def test_contexts_may_be_longer_than_another_model_has_positions(models: Any, text: Any) -> None:
    """40 positions in the GPT-2: what it cannot read gives no rows, and is counted."""
    over = corpus(text, models, context_length=64)
    held = over.held_out(Aligner.of(models, vocabulary=over.vocabulary))
    assert held.aligned is not None and held.aligned.beyond["two"] > 0 == held.aligned.beyond["one"]
    assert sum(len(batch.x) for batch in stream(models, held).contexts()) == int(held.kept.sum()) > 0
