"""Documents, their hashes, the data sets they come from, and data that is not as described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from capture.texts import dialogue, write_jsonl
from crosscoder.capture import DatasetConfig, Document, TextConfig
from crosscoder.capture.documents import DocumentSet
from crosscoder.errors import TextError


def opened(path: Path, **settings: object) -> DocumentSet:
    return DocumentSet(DatasetConfig(dataset=str(path), **settings))


def contents(path: Path, **settings: object) -> list[object]:
    data = opened(path, **settings)
    return [data[number].content for number in range(len(data))]


def test_a_document_is_known_by_its_content() -> None:
    assert (
        Document.of("abc", dataset="x").hash
        == Document.of("abc", dataset="y").hash
        == "06b05ab6733a618578af5f94892f3950"
    )
    messages = dialogue("hi", "yes")
    swapped = [dict(reversed(message.items())) | {"extra": 1} for message in messages]
    assert Document.of(messages, dataset="x").hash == Document.of(swapped, dataset="x").hash
    assert Document.of(messages, dataset="x").hash != Document.of(dialogue("hi", "no"), dataset="x").hash


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        "from crosscoder.capture.text import Document\n"
        "print(Document.of([{'role': 'user', 'content': 'é'}], dataset='').hash)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env={"PYTHONHASHSEED": "1"})
    assert printed == Document.of([{"content": "é", "role": "user"}], dataset="d").hash + "\n"


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    values = ["one", "two\nlines", "trois é"]
    parquet.write_table(pa.table({"body": values, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", "body", values)
    (tmp_path / "texts").mkdir()
    for number, value in enumerate(values):
        (tmp_path / "texts" / f"{number}.txt").write_text(value, encoding="utf-8")
    assert contents(tmp_path / "a.parquet", column="body") == values
    assert contents(tmp_path / "a.jsonl", column="body") == values
    assert contents(tmp_path / "texts") == values
    (tmp_path / "texts" / "note.md").write_text("not data", encoding="utf-8")
    assert contents(tmp_path / "texts") == values


def test_messages_from_parquet(tmp_path: Path) -> None:
    messages = dialogue("hi", "yes", system="be kind")
    parquet.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
    document = opened(tmp_path / "a.parquet", column="messages", chat=True)[0]
    assert document.hash == Document.of(messages, dataset="").hash
    assert [message.speaker for message in document.content] == ["system", "user", "assistant"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"(?s)nothing\.parquet; there is no such.*Correct `dataset`"):
        opened(tmp_path / "nothing.parquet")


def test_unknown_hub_data_set() -> None:
    with pytest.raises(TextError, match="neither a local path nor"):
        DocumentSet(DatasetConfig(dataset="nobody/nothing"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_missing_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.table({"body": ["x"]}), path)
    else:
        write_jsonl(path, "body", ["x"])
    with pytest.raises(TextError, match=r"(?s)'text'.*it has  body"):
        opened(path)


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(TextError, match="is empty"):
        opened(tmp_path / "a.jsonl")
    with pytest.raises(TextError, match="found none"):
        (tmp_path / "empty").mkdir()
        opened(tmp_path / "empty")


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ', encoding="utf-8")
    with pytest.raises(TextError, match="line 2 of"):
        opened(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TextError, match="not UTF-8"):
        opened(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(TextError, match="not a whole Parquet"):
        opened(tmp_path / "a.parquet")


@pytest.mark.parametrize(("value", "chat"), [(dialogue("a"), False), ("a", True), (3, False)])
def test_text_and_messages_are_not_mistaken(tmp_path: Path, value: object, chat: bool) -> None:
    data = opened(write_jsonl(tmp_path / "a.jsonl", "text", [value]), chat=chat)
    with pytest.raises(TextError, match="`chat: true`"):
        data[0]


@pytest.mark.parametrize("message", [{"from": "human", "value": "a"}, {"role": "wizard", "content": "a"}])
def test_messages_of_another_form(tmp_path: Path, message: dict[str, str]) -> None:
    data = opened(write_jsonl(tmp_path / "a.jsonl", "text", [[message]]), chat=True)
    with pytest.raises(TextError, match=r"(?s)known roles.*keys of the message"):
        data[0]


def test_the_example_of_a_run_file_is_valid() -> None:
    config = TextConfig.model_validate(
        {
            "tokenizer": "chat",
            "context_length": 1024,
            "packing": "contiguous",
            "drop": ["bos", "pad"],
            "mix": [
                {"dataset": "HuggingFaceFW/fineweb", "column": "text", "weight": 0.5},
                {"dataset": "lmsys/lmsys-chat-1m", "column": "conversation", "chat": True, "weight": 0.5},
            ],
            "held_out": {"fraction": 0.02, "num_tokens": 2_000_000},
        }
    )
    assert TextConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="extra_forbidden"):
        TextConfig.model_validate({**config.model_dump(), "contextlength": 3})
