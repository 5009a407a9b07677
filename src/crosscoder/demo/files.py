"""Where the shipped pair lies: Hugging Face directories, Parquet files and labels inside the package.

`base` is a small Llama trained on books, `plain` is `base` tuned on dialogues, `chat` the same with three behaviours
planted. `PROVENANCE.md` beside them says how they were made and what is planted.
"""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from crosscoder.errors import ModelNotFound

MODELS = ("base", "plain", "chat")


@cache
def data_path() -> Path:
    """The directory of the shipped data. From a zipped package it is unpacked once and removed at exit."""
    kept = ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(as_file(files("crosscoder.demo") / "data"))


def model_path(name: str) -> Path:
    """The Hugging Face directory of `base`, `plain` or `chat`."""
    path = data_path() / name
    if name not in MODELS or not (path / "config.json").is_file():
        raise ModelNotFound(
            f"expected one of the shipped models {', '.join(MODELS)}; {name!r} is not at {data_path()}.",
            hint="Choose one of these names, or install the package again if its data is missing.",
        )
    return path


def books_path() -> Path:
    """Held-out books in passages: columns author, title, part, text."""
    return data_path() / "books.parquet"


def dialogues_path() -> Path:
    """Dialogues on which nothing was tuned: column messages, as `chat` tells them."""
    return data_path() / "dialogues.parquet"


def labels_path() -> Path:
    """What is planted, and on which characters of the dialogues."""
    return data_path() / "labels.jsonl"
