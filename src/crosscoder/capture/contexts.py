"""Contexts: tokenized windows of text in which every token knows its document, its characters and who speaks it.

A context opens with BOS where the tokenizer has one. Packed contiguously, documents follow one another with EOS between
them and are cut at the context's length; packed by document, a long one becomes several windows and a short one a
shorter context. Tokens that belong to no document (BOS) have document -1 and no characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from crosscoder.activations import ROLES
from crosscoder.capture.chat import Rendered, render
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.text import Document, Drop

_TEMPLATE = ROLES.index("template")


@dataclass(frozen=True)
class DocumentId:
    """What remains of a document once its tokens are taken: its hash and data set."""

    hash: str
    dataset: str


@dataclass(frozen=True)
class Tokens:
    """Tokens side by side: id, role, number of the document (-1: none), its characters [start, end), kept or not."""

    ids: np.ndarray
    roles: np.ndarray
    document: np.ndarray
    char_start: np.ndarray
    char_end: np.ndarray
    kept: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` up to `stop`."""
        return Tokens(*(column[start:stop] for column in self.columns()))

    def columns(self) -> tuple[np.ndarray, ...]:
        """The columns, in the order of the fields."""
        return self.ids, self.roles, self.document, self.char_start, self.char_end, self.kept

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """Several stretches one after the other."""
        return cls(*(np.concatenate(columns) for columns in zip(*(part.columns() for part in parts), strict=True)))


@dataclass(frozen=True)
class Reading:
    """The same text in another tokenizer's tokens: `places[p]` is the one after which both have read the same, or −1.

    `num_tokens` of them are text; `unlike` windows were lost because they are spelled otherwise, `beyond` because the
    model has no positions for them. See `alignment`.
    """

    ids: np.ndarray
    places: np.ndarray
    num_tokens: int
    unlike: int
    beyond: int


@dataclass(frozen=True)
class Context:
    """One window of text; `tokens.document` counts within `documents`, and only kept tokens become rows.

    `readings` are the same text in other tokenizations, by the hash of their vocabularies.
    """

    tokens: Tokens
    documents: tuple[DocumentId, ...]
    readings: Mapping[str, Reading] = field(default_factory=dict[str, Reading])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_rows(self) -> int:
        """How many rows it gives."""
        return int(self.tokens.kept.sum())


@dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens, and tells which become rows."""

    tokenizer: Tokenizer
    drop: tuple[Drop, ...]

    def encode(self, document: Document, *, separator: bool) -> Tokens:
        """The document's tokens without BOS; with `separator`, EOS closes it where the tokenizer has one."""
        return self.encode_rendered(render(document, self.tokenizer), separator=separator)

    def encode_rendered(self, rendered: Rendered, *, separator: bool) -> Tokens:
        """The tokens of text that is rendered already."""
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int32).reshape(-1, 2)
        first = int(len(ids) > 0 and ids[0] == self._id("bos"))
        tokens = self._tokens(ids[first:], _token_roles(rendered.roles(), offsets[first:]), offsets[first:])
        eos = self._id("eos")
        if not separator or eos is None or len(tokens) == 0 or tokens.ids[-1] == eos:
            return tokens
        return Tokens.join([tokens, self._special(eos, document=0, at=len(rendered.text))])

    def opening(self) -> Tokens | None:
        """The BOS that opens a context, or None where the tokenizer has none."""
        bos = self._id("bos")
        return None if bos is None else self._special(bos, document=-1, at=0)

    def _id(self, name: str) -> int | None:
        return cast("int | None", self.tokenizer.bos_token_id if name == "bos" else self.tokenizer.eos_token_id)

    def _special(self, token: int, *, document: int, at: int) -> Tokens:
        one = self._tokens(np.array([token], np.int32), np.array([_TEMPLATE], np.int8), np.array([[at, at]], np.int32))
        return Tokens(one.ids, one.roles, np.array([document], np.int32), one.char_start, one.char_end, one.kept)

    def _tokens(self, ids: np.ndarray, roles: np.ndarray, offsets: np.ndarray) -> Tokens:
        return Tokens(
            ids=ids,
            roles=roles,
            document=np.zeros(len(ids), np.int32),
            char_start=offsets[:, 0],
            char_end=offsets[:, 1],
            kept=~self._dropped(ids, roles),
        )

    def _dropped(self, ids: np.ndarray, roles: np.ndarray) -> np.ndarray:
        """Padding is added only when a forward pass needs it, so `pad` has nothing to do here."""
        dropped = np.zeros(len(ids), dtype=bool)
        for name in self.drop:
            if name == "template":
                dropped |= roles == _TEMPLATE
            elif name != "pad" and self._id(name) is not None:
                dropped |= ids == self._id(name)
        return dropped


def _token_roles(characters: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """A token has the role of its last character; one without characters is the template's."""
    last = offsets[:, 1] - 1
    empty = offsets[:, 1] <= offsets[:, 0]
    padded = np.append(characters, np.int8(_TEMPLATE))
    return np.where(empty, np.int8(_TEMPLATE), padded[last])


def assemble(opening: Tokens | None, pieces: Sequence[tuple[Tokens, DocumentId]]) -> Context:
    """One context from stretches of documents, numbered in order."""
    numbered = [
        Tokens(part.ids, part.roles, np.full(len(part), number, np.int32), part.char_start, part.char_end, part.kept)
        for number, (part, _) in enumerate(pieces)
    ]
    tokens = Tokens.join(numbered if opening is None else [opening, *numbered])
    return Context(tokens, tuple(document for _, document in pieces))
