"""Reading data sets: local Parquet, JSONL and text files are read into memory, Hub data sets are memory-mapped.

Every text file is one document; a directory is all its files in the order of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crosscoder.capture.text import DatasetConfig, Document
from crosscoder.errors import TextError

_READABLE = (".parquet", ".jsonl", ".txt")


class DocumentSet:
    """The documents of one data set, by number."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self._values = _open(config)
        if len(self._values) == 0:
            raise TextError(
                f"expected documents in {config.dataset}; it is empty.",
                hint="Check the path and the split, or take it out of `mix`.",
            )

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, number: int) -> Document:
        value = self._values[number]
        if value is None:
            value = () if self.config.chat else ""
        if isinstance(value, str) == self.config.chat or not isinstance(value, (str, list, tuple)):
            raise _wrong_kind(self.config, number, value)
        return Document.of(value, dataset=self.config.dataset)


def _wrong_kind(config: DatasetConfig, number: int, value: object) -> TextError:
    expected = "a list of messages" if config.chat else "text"
    return TextError(
        f"expected {expected} in column {config.column!r} of {config.dataset}; document {number} is a "
        f"{type(value).__name__}.",
        hint="Set `chat: true` for messages and `chat: false` for text, and check `column`.",
    )


def _open(config: DatasetConfig) -> Sequence[Any]:
    path = Path(config.dataset).expanduser()
    if path.exists():
        return _local(config, path)
    if config.dataset.startswith(("/", ".", "~")) or config.dataset.count("/") > 1 or path.suffix in _READABLE:
        raise TextError(
            f"expected a data set at {config.dataset}; there is no such file or directory.",
            hint="Correct `dataset`, or give the id of a data set on the Hub, such as HuggingFaceFW/fineweb.",
        )
    return _from_hub(config)


def _local(config: DatasetConfig, path: Path) -> Sequence[Any]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _READABLE)
    if not files or any(file.suffix not in _READABLE for file in files):
        raise TextError(
            f"expected Parquet, JSONL or text files at {path}; found none.",
            hint=f"Convert the data to files that end in {', '.join(_READABLE)}.",
        )
    return _Joined([_read(file, config.column) for file in files])


class _Joined(Sequence[Any]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._places = [(part, index) for part in range(len(parts)) for index in range(len(parts[part]))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        part, index = self._places[number]
        return self._parts[part][index]


def _read(file: Path, column: str) -> Sequence[Any]:
    try:
        if file.suffix == ".parquet":
            return _parquet(file, column)
        if file.suffix == ".jsonl":
            return list(_json_lines(file, column))
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: {error}.", hint="Convert it to UTF-8.") from error


class _Column(Sequence[Any]):
    """A column of an Arrow table as Python values, converted one at a time."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, number: Any) -> Any:
        return self._column[number].as_py()


def _parquet(file: Path, column: str) -> Sequence[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(file).names
        if column not in names:
            raise _no_column(file, column, names)
        return _Column(parquet.read_table(file, columns=[column]).column(column))
    except pyarrow.ArrowInvalid as error:
        raise TextError(f"{file} is not a whole Parquet file: {error}.", hint="Copy or download it again.") from error


def _json_lines(file: Path, column: str) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_value(file, column, number, line)


def _json_value(file: Path, column: str, number: int, line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(
            f"line {number} of {file} is not JSON: {error}.", hint="Correct or remove that line."
        ) from error
    if not isinstance(value, dict) or column not in value:
        raise _no_column(f"line {number} of {file}", column, list(value) if isinstance(value, dict) else [])
    return value[column]


def _no_column(where: object, column: str, names: Sequence[str]) -> TextError:
    return TextError(
        f"expected a column {column!r} in {where}.",
        details=[f"it has  {', '.join(names) or 'no columns'}"],
        hint="Set `column` to one of these.",
    )


def _from_hub(config: DatasetConfig) -> Sequence[Any]:
    from datasets import load_dataset

    try:
        data: Any = load_dataset(config.dataset, config.subset, split=config.split, revision=config.revision)
    except (OSError, ValueError) as error:
        raise TextError(
            f"{config.dataset!r} is neither a local path nor a data set that the Hub gave.",
            details=[f"datasets said: {str(error).strip().splitlines()[0][:300]}"],
            hint="Check the id, `split` and `subset`, the network, and access rights; or give a local file.",
        ) from error
    if config.column not in data.column_names:
        raise _no_column(config.dataset, config.column, data.column_names)
    return data.with_format(None)[config.column]
