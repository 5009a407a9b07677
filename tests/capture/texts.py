"""Small corpora for the tests of text and streams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosscoder.capture import DatasetConfig, HeldOutConfig, TextConfig


def write_jsonl(path: Path, column: str, values: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values), encoding="utf-8")
    return path


def text_config(*datasets: DatasetConfig | Path, **settings: Any) -> TextConfig:
    """Short contexts and a tenth held out, unless said otherwise."""
    mix = tuple(data if isinstance(data, DatasetConfig) else DatasetConfig(dataset=str(data)) for data in datasets)
    held_out = settings.pop("held_out", HeldOutConfig(fraction=0.1, num_tokens=400))
    return TextConfig(**{"tokenizer": "base", "context_length": 16, "mix": mix, "held_out": held_out} | settings)


def dialogue(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Alternating user and assistant turns."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(turns)
    ]
