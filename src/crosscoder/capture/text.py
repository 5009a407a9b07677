"""What text a run is about: its description in `run.yaml`, and documents with their hashes.

A document is known by the hash of its content alone, so that it is on the same side of the split in every run with that
seed, and a label that names it finds it anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from xxhash import xxh3_128

from crosscoder.errors import TextError

Packing = Literal["contiguous", "document"]
Drop = Literal["bos", "eos", "pad", "template"]
Alignment = Literal["identical", "bytes"]

_SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "tool": "template",
    "function": "template",
}


class DatasetConfig(BaseModel):
    """One data set in the mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="a Hub id, or a Parquet, JSONL or text file, or a directory of such files")
    column: str = Field(default="text", description="the column that holds the text, or the list of messages")
    weight: float = Field(default=1.0, gt=0, description="share of the tokens, relative to the other data sets")
    chat: bool = Field(default=False, description="whether the column holds messages to render by the chat template")
    split: str = Field(default="train", description="split of a data set on the Hub")
    subset: str | None = Field(default=None, description="configuration of a data set on the Hub; null is its default")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub; null is its main branch")


class HeldOutConfig(BaseModel):
    """The documents that never enter training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.02, gt=0, lt=1, description="share of the documents that is held out, by hash")
    num_tokens: int = Field(default=2_000_000, ge=1, description="size of the analysis set; fewer if text runs out")


class TextConfig(BaseModel):
    """The text whose activations are studied, and how it is cut into contexts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: str = Field(description="alias of the model whose tokenizer and chat template render the text")
    context_length: int = Field(default=1024, ge=2, description="tokens in a context, the opening BOS included")
    packing: Packing = Field(
        default="contiguous",
        description="contiguous: documents follow one another and are cut; document: every context is of one document",
    )
    alignment: Alignment = Field(
        default="identical",
        description="identical: all models share the tokenizer's vocabulary; bytes: models with other tokenizers read "
        "the same text, and rows are where tokens of all of them end at the same byte",
    )
    drop: tuple[Drop, ...] = Field(default=("bos", "pad"), description="tokens that never become rows")
    mix: tuple[DatasetConfig, ...] = Field(min_length=1, description="the data sets and their shares of the tokens")
    held_out: HeldOutConfig = Field(default_factory=HeldOutConfig, description="what is kept back for analysis")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str

    @property
    def speaker(self) -> str:
        """The row role of this turn's content: system, user, assistant, or template for what tools say."""
        return _SPEAKERS[self.role]


Content = str | tuple[Message, ...]


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a dialogue, with the hash it is known by."""

    content: Content
    hash: str
    dataset: str

    @classmethod
    def of(cls, value: str | Iterable[Mapping[str, Any]], *, dataset: str) -> Document:
        """A document from a string, or from messages as mappings with `role` and `content`."""
        content = value if isinstance(value, str) else tuple(_message(message, dataset) for message in value)
        return cls(content, document_hash(content), dataset)


def document_hash(content: Content) -> str:
    """xxh3-128 of the text, or of the messages as JSON: `[{"content": ..., "role": ...}, ...]`, sorted keys."""
    if not isinstance(content, str):
        messages = [{"role": message.role, "content": message.content} for message in content]
        content = json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxh3_128(content.encode("utf-8", "surrogatepass")).hexdigest()


def _message(message: Mapping[str, Any], dataset: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _SPEAKERS or not isinstance(content, str):
        raise TextError(
            f"expected messages with a role and a content in {dataset}; got one with role {role!r} "
            f"and a content of type {type(content).__name__}.",
            details=[f"known roles: {', '.join(_SPEAKERS)}", f"keys of the message: {', '.join(map(str, message))}"],
            hint="Convert the data set to messages of the form {role, content}, with text as content.",
        )
    return Message(role, content)
