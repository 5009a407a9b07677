"""Packing, mixing, epochs, the split and the cursor."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.texts import dialogue, text_config, write_jsonl
from conftest import toy_texts
from crosscoder.capture import Context, Corpus, DatasetConfig, Document, HeldOutConfig
from crosscoder.errors import TextError

BOS, EOS = 1, 2


@pytest.fixture
def two_datasets(tmp_path: Path) -> list[DatasetConfig]:
    texts = write_jsonl(tmp_path / "texts.jsonl", "text", toy_texts(40))
    chats = [dialogue(text[:30], text[30:80], "and then?", text[80:120]) for text in toy_texts(40)]
    chat = write_jsonl(tmp_path / "chats.jsonl", "messages", chats)
    return [
        DatasetConfig(dataset=str(texts), weight=3),
        DatasetConfig(dataset=str(chat), column="messages", chat=True, weight=1),
    ]


def ids(text: str, tokenizer: hf.PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def same(a: Context, b: Context) -> bool:
    return a.documents == b.documents and all(
        (x == y).all() and len(x) == len(y) for x, y in zip(a.tokens.columns(), b.tokens.columns(), strict=True)
    )


def test_contiguous_packing_loses_nothing(tmp_path: Path, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    texts = toy_texts(20)
    corpus = Corpus(text_config(write_jsonl(tmp_path / "a.jsonl", "text", texts)), toy_tokenizer, seed=0)
    by_hash = {Document.of(text, dataset="").hash: text for text in texts}
    stream, order = [], []
    for context in islice(corpus.training(), 40):
        assert len(context) == 16 and context.tokens.ids[0] == BOS
        assert context.tokens.document[0] == -1 and not context.tokens.kept[0] and context.tokens.kept[1:].all()
        stream += context.tokens.ids[1:].tolist()
        order += [document.hash for document in context.documents]
    order = [hash for number, hash in enumerate(order) if number == 0 or order[number - 1] != hash]
    expected = [token for hash in order for token in [*ids(by_hash[hash], toy_tokenizer), EOS]]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 200


def test_packing_by_document(tmp_path: Path, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    texts = ["a dog", "the old house stood at the end of a long lane " * 4, *(f"number {n}" for n in range(20))]
    config = text_config(
        write_jsonl(tmp_path / "a.jsonl", "text", texts), packing="document", held_out=HeldOutConfig(fraction=1e-9)
    )
    windows: dict[str, list[list[int]]] = {}
    stream = Corpus(config, toy_tokenizer, seed=0).training()
    while (context := next(stream)) and stream.state_dict()["datasets"][0]["epoch"] == 0:
        assert len(context.documents) == 1 and len(context) <= 16
        windows.setdefault(context.documents[0].hash, []).append(context.tokens.ids.tolist())
    for text in texts[:2]:
        whole = ids(text, toy_tokenizer)
        pieces = [[BOS, *whole[start : start + 15]] for start in range(0, len(whole), 15)]
        assert windows[Document.of(text, dataset="").hash] == pieces


def test_characters_find_the_text_again(two_datasets: list[DatasetConfig], toy_tokenizer: object) -> None:
    corpus = Corpus(text_config(two_datasets[0]), toy_tokenizer, seed=0)
    by_hash = {Document.of(text, dataset="").hash: text for text in toy_texts(40)}
    for context in islice(corpus.training(), 20):
        tokens = context.tokens
        for number, (token, document) in enumerate(zip(tokens.ids, tokens.document, strict=True)):
            if token in (BOS, EOS):
                continue
            text = by_hash[context.documents[document].hash][tokens.char_start[number] : tokens.char_end[number]]
            assert toy_tokenizer.decode([token]).strip() == text.strip()


def test_one_bos_even_where_the_template_writes_one(two_datasets: list[DatasetConfig], toy_tokenizer: object) -> None:
    corpus = Corpus(text_config(two_datasets[1], packing="document", context_length=200), toy_tokenizer, seed=0)
    for context in islice(corpus.training(), 10):
        assert (context.tokens.ids == BOS).nonzero()[0].tolist() == [0]


def test_mixing_follows_the_weights(two_datasets: list[DatasetConfig], toy_tokenizer: object) -> None:
    stream = Corpus(text_config(*two_datasets), toy_tokenizer, seed=0).training()
    for _ in range(400):
        next(stream)
        served = [place["served"] for place in stream.state_dict()["datasets"]]
        assert abs(served[0] / 3 - served[1]) < 200


def test_epochs_are_new_permutations_of_the_same_documents(
    tmp_path: Path, toy_tokenizer: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", "text", [f"text {number}" for number in range(30)])
    corpus = Corpus(text_config(path, packing="document"), toy_tokenizer, seed=0)
    stream = corpus.training()
    first = next(stream).documents[0].hash
    seen = [first]
    with caplog.at_level(logging.INFO, "crosscoder"):
        while stream.state_dict()["datasets"][0]["epoch"] < 2:
            seen.append(next(stream).documents[0].hash)
    half = len(seen) // 2
    assert set(seen[:half]) == set(seen[half:-1]) and len(set(seen)) == half
    assert seen[:half] != seen[half:-1]
    assert "epoch 2 begins" in caplog.text


def test_the_split_is_by_hash_and_holds(two_datasets: list[DatasetConfig], toy_tokenizer: object) -> None:
    config = text_config(*two_datasets, held_out=HeldOutConfig(fraction=0.3, num_tokens=10**6))
    corpus = Corpus(config, toy_tokenizer, seed=0)
    held = {document.hash for document in corpus.held_out().documents}
    trained = {document.hash for context in islice(corpus.training(), 1500) for document in context.documents}
    assert not held & trained and len(held) + len(trained) == 80
    assert 10 < len(held) < 40
    other = Corpus(config, toy_tokenizer, seed=1)
    assert {document.hash for document in other.held_out().documents} != held


def test_held_out_text_is_not_repeated(tmp_path: Path, toy_tokenizer: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", "text", toy_texts(30) * 3)
    corpus = Corpus(text_config(path, held_out=HeldOutConfig(fraction=0.3, num_tokens=10**6)), toy_tokenizer, seed=0)
    analysis = corpus.held_out()
    assert (analysis.token_ids == EOS).sum() == len(analysis.documents) == len({d.hash for d in analysis.documents})


def test_too_few_documents_to_hold_any_out(tmp_path: Path, toy_tokenizer: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", "text", ["only one"])
    with pytest.raises(TextError, match=r"(?s)no document fell.*1 documents in.*Raise text\.held_out\.fraction"):
        Corpus(text_config(path, held_out=HeldOutConfig(fraction=1e-9)), toy_tokenizer, seed=0).held_out()


@pytest.mark.parametrize("texts", [["only one"], ["", ""]])
def test_nothing_left_for_training(tmp_path: Path, texts: list[str], toy_tokenizer: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", "text", texts)
    with pytest.raises(TextError, match="no document .* is left for training"):
        next(Corpus(text_config(path, held_out=HeldOutConfig(fraction=0.999999)), toy_tokenizer, seed=0).training())


@pytest.mark.parametrize("packing", ["contiguous", "document"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_cursor_is_exact(packing: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    corpus = _corpus(packing, tmp_path_factory)
    stream = corpus.training()
    for _ in range(data.draw(st.integers(0, 150))):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = corpus.training()
    resumed.load_state_dict(state)
    assert all(same(next(stream), next(resumed)) for _ in range(30))


_corpora: dict[str, Corpus] = {}


def _corpus(packing: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    from conftest import build_toy_tokenizer

    if packing not in _corpora:
        root = tmp_path_factory.mktemp("cursor")
        text = write_jsonl(root / "a.jsonl", "text", toy_texts(15))
        other = write_jsonl(root / "b.jsonl", "text", [f"text {number}" for number in range(10)])
        _corpora[packing] = Corpus(text_config(text, other, packing=packing), build_toy_tokenizer(), seed=3)
    return _corpora[packing]


def test_the_same_seed_gives_the_same_text(two_datasets: list[DatasetConfig], toy_tokenizer: object) -> None:
    config = text_config(*two_datasets)
    one, two, other = (Corpus(config, toy_tokenizer, seed=seed).training() for seed in (0, 0, 1))
    assert all(same(next(one), next(two)) for _ in range(20))
    assert not all(same(next(one), next(other)) for _ in range(5))


@pytest.mark.parametrize(("drop", "lost"), [((), 0), (("bos",), 1), (("bos", "eos"), 2), (("template",), 2)])
def test_dropped_tokens(tmp_path: Path, drop: tuple[str, ...], lost: int, toy_tokenizer: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", "text", ["a dog ran"] * 2 + ["the old house"])
    corpus = Corpus(
        text_config(path, drop=drop, context_length=2 + len(ids("a dog ran", toy_tokenizer))), toy_tokenizer, seed=0
    )
    context = next(context for context in corpus.training() if EOS in context.tokens.ids[1:])
    count = 1 + (context.tokens.ids == EOS).sum()
    expected = {0: 0, 1: 1, 2: count}[lost]
    assert len(context) - context.num_rows == expected
