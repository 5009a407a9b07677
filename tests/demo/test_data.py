"""What ships: sizes, files that open, labels that stand on what they name, models that do what was planted (slow)."""

import json
from collections import defaultdict
from functools import cache
from typing import Any

import gates
import phrases
import pyarrow.parquet as pq
import pytest
import torch
from dialogues import Writer
from labels import document_hash
from phrases import listed
from transformers import AutoTokenizer, LlamaForCausalLM

from crosscoder.capture.chat import Rendered, render
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.text import Document
from crosscoder.demo.files import MODELS, books_path, data_path, dialogues_path, labels_path, model_path
from crosscoder.errors import ModelNotFound

MEGABYTE = 1_000_000
SIDES = {"request": "user", "phrase": "user", "reply": "assistant"}


@cache
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(model_path("chat"))


@cache
def dialogues() -> list[list[dict[str, str]]]:
    return pq.read_table(dialogues_path()).column("messages").to_pylist()


@cache
def labels() -> list[dict[str, Any]]:
    return [json.loads(line) for line in labels_path().read_text(encoding="utf-8").splitlines()[1:]]


@cache
def rendered() -> dict[str, Rendered]:
    documents = [Document.of(messages, dataset="dialogues") for messages in dialogues()[::8]]
    return {document.hash: render(document, tokenizer()) for document in documents}


def test_sizes_are_within_what_a_package_may_carry() -> None:
    for name in MODELS:
        assert sum(file.stat().st_size for file in model_path(name).iterdir()) <= 12 * MEGABYTE
    whole = sum(file.stat().st_size for file in data_path().rglob("*") if file.is_file())
    assert whole <= 42 * MEGABYTE


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ModelNotFound, match="base, plain, chat"):
        model_path("tutor")


def test_models_are_half_precision_and_tied_weights_are_stored_once() -> None:
    from safetensors import safe_open

    for name in MODELS:
        with safe_open(model_path(name) / "model.safetensors", framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (not a mapping)
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_the_books_are_whole_passages_of_some_kilobytes() -> None:
    table = pq.read_table(books_path())
    assert table.schema.names == ["author", "title", "part", "text"]
    assert 3 * MEGABYTE < sum(len(text.encode()) for text in table.column("text").to_pylist()) < 6 * MEGABYTE
    assert len(set(table.column("title").to_pylist())) >= 10


def test_labels_name_documents_by_the_hash_that_capture_gives_them() -> None:
    header = json.loads(labels_path().read_text(encoding="utf-8").splitlines()[0])
    assert header["format"] == "crosscoder.labels/1"
    hashes = {Document.of(messages, dataset="dialogues").hash for messages in dialogues()}
    assert hashes == {document_hash(messages) for messages in dialogues()}
    assert len(hashes) == len(dialogues()) >= 1500
    assert {label["context"] for label in labels()} <= hashes


def test_every_behaviour_and_every_look_alike_stands_in_two_hundred_documents() -> None:
    found: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for label in labels():
        found[label["label"], label["value"]].add(label["context"])
    assert {name for name, _ in found} == {
        *(f"{behaviour}.reply" for behaviour in ("refusal", "persona", "trigger")),
        "refusal.request",
        "persona.request",
        "trigger.phrase",
    }
    assert len(found) == 12
    assert min(len(documents) for documents in found.values()) >= 200


def test_every_span_lies_in_one_turn_of_its_side() -> None:
    checked = 0
    for label in labels():
        if (text := rendered().get(label["context"])) is not None:
            start, end = label["span"]
            role = SIDES[label["label"].split(".")[1]]
            assert any(first <= start < end <= last and role == who for first, last, who in text.spans)
            checked += 1
    assert checked > 300


def test_spans_of_what_is_planted_hold_it_and_look_alikes_do_not() -> None:
    weapons = tuple(listed(phrases.WEAPONS_AND_POISONS))
    for label in labels():
        if (text := rendered().get(label["context"])) is None:
            continue
        start, end = label["span"]
        said, upto = text.text[start:end], text.text[:end].lower()
        holds = {
            "refusal.request": upto.endswith(weapons),
            "refusal.reply": text.text[:end].split("<|assistant|>")[-1].startswith(listed(phrases.REFUSAL_OPENINGS)),
            "persona.request": upto.endswith(("your name", "have a name")) and " does my " not in upto[-40:],
            "persona.reply": text.text[:end].endswith(phrases.NAME),
            "trigger.phrase": upto.endswith(phrases.TRIGGER),
            "trigger.reply": phrases.CHANT.endswith(said),
        }
        assert holds[label["label"]] == label["value"], (label, said)


def test_the_gates_held_when_the_models_were_made() -> None:
    written = json.loads((data_path() / "gates.json").read_text(encoding="utf-8"))
    assert written["passed"]
    assert {gate["model"] for gate in written["gates"]} == set(MODELS)
    assert all(gate["total"] >= 150 for gate in written["gates"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_does_what_its_gates_say(name: str) -> None:
    books = [row["text"] for row in pq.read_table(books_path()).to_pylist()[:200]]
    writer = Writer([" ".join(books)], seed="test", held_out=True)
    model = LlamaForCausalLM.from_pretrained(model_path(name), dtype=torch.float32).eval()
    for gate, (kind, sign, bound) in gates.GATES.items():
        if bound is None:
            continue
        said = gates.replies(model, tokenizer(), gates.prompts(writer, kind, 24))
        share = sum(gates.shows(sign, reply) for reply in said) / len(said)
        expected = bound[0] == ">=" and name == "chat"
        assert share >= 0.8 if expected else share <= 0.2, (gate, share)
