"""Which bytes of a text each token stands for, whatever kind of tokenizer made it.

    byte level        a token spells its bytes, maybe a part of a character (GPT-2, Llama 3, Qwen, Pythia)
    sentence pieces   `▁` is a space, `<0xE2>` a byte; a space put before the text is not of it (Llama 2, Gemma, T5)
    word pieces       a token spells its characters; white space is not read at all (BERT, word-level vocabularies)

An added token spells its content. A token is *exact* where its spelling is what the text has there. One that is not
(an unknown token, a letter that was made small, characters that were normalised) ends where the tokenizer says that it
does, in whole characters, and nothing is claimed of what it told the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Bool, Int

from crosscoder.capture.huggingface import Tokenizer
from crosscoder.errors import TokenizerMismatch

Kind = Literal["bytes", "pieces", "words"]
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = "\ufffd".encode()


@dataclass(frozen=True)
class Spelled:
    """By token: the byte of the text that it ends before, and whether it spells exactly what lies up to there."""

    ends: Int[np.ndarray, "tokens"]
    exact: Bool[np.ndarray, "tokens"]

    def __len__(self) -> int:
        return len(self.ends)


@dataclass(frozen=True)
class Spelling:
    """What every token of one vocabulary spells, by id; None for the unknown token and for ids without one."""

    kind: Kind
    pieces: tuple[bytes | None, ...]
    added: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Spelling:
        """Raises TokenizerMismatch for a tokenizer that does not tell the characters of its tokens, or their bytes."""
        kind = _kind(tokenizer)
        vocabulary = tokenizer.get_vocab()
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        pieces: list[bytes | None] = [None] * (1 + max(vocabulary.values()))
        for token, number in vocabulary.items():
            pieces[number] = _piece(kind, token)
        for number, content in added.items():
            pieces[number] = content.encode()
        for token in _unknown_tokens(tokenizer) if kind != "bytes" else ():
            pieces[vocabulary[token]] = None
        return cls(kind, tuple(pieces), frozenset(added))

    def read(self, ids: Sequence[int], *, opening: int | None = None) -> tuple[str, Spelled]:
        """The text that tokens spell, and where each ends in it.

        Where the first of them opens its document, `opening` is the number of characters that it has there. Tokens may
        begin or end inside a character: its bytes are no text, and the tokens that spell them not exact. An unknown
        token reads as U+FFFD.
        """
        known = np.array([self.pieces[i] is not None for i in ids], dtype=bool)
        parts = [self.pieces[i] or (b"" if k else _UNKNOWN) for i, k in zip(ids, known, strict=True)]
        if opening is not None and self.kind == "pieces" and len(parts[0].decode("utf-8", "replace")) > opening:
            parts[0] = parts[0].removeprefix(b" ")  # put there by the tokenizer
        raw = b"".join(parts)
        start, stop = _whole_characters(raw)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64) - start
        exact = known & (np.append(-start, ends[:-1]) >= 0) & (ends <= stop - start)
        return raw[start:stop].decode(), Spelled(ends.clip(min=0), exact)

    def place(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Spelled:
        """Where each token of `text` ends, from what it spells, or from its characters where it spells otherwise."""
        raw = text.encode()
        parts = [self.pieces[i] for i in ids]
        joined = b"".join(part or b"" for part in parts)
        if parts and parts[0] and self.kind == "pieces" and _leading_spaces(joined) > _leading_spaces(raw):
            parts[0], joined = parts[0][1:], joined[1:]  # put there by the tokenizer
        if joined == raw and None not in parts:
            ends = np.cumsum([len(part or b"") for part in parts], dtype=np.int64)
            return Spelled(ends, np.ones(len(parts), dtype=bool))
        return self._token_by_token(raw, ids, parts, places=_in_bytes(text, offsets))

    def _token_by_token(
        self, raw: bytes, ids: Sequence[int], parts: Sequence[bytes | None], *, places: Int[np.ndarray, "tokens two"]
    ) -> Spelled:
        ends, exact, cursor = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool), 0
        opens = False
        for number, (part, (start, stop)) in enumerate(zip(parts, places.tolist(), strict=True)):
            found = self._found(raw, cursor, part, opens=opens, start=start)
            exact[number] = found is not None
            cursor = max(cursor, stop) if found is None else found
            ends[number], opens = cursor, ids[number] in self.added
        return Spelled(ends, exact)

    def _found(self, raw: bytes, cursor: int, piece: bytes | None, *, opens: bool, start: int) -> int | None:
        """Where the text goes on after `piece`; None where it is not what comes next."""
        if piece is None:
            return None
        if raw.startswith(piece, cursor):
            return cursor + len(piece)
        if opens and self.kind == "pieces" and piece[:1] == b" " and raw.startswith(piece[1:], cursor):
            return cursor + len(piece) - 1
        unread = raw[cursor:start].decode("utf-8", "replace")
        if self.kind == "words" and unread.isspace() and raw.startswith(piece, start):
            return start + len(piece)
        return None


def _kind(tokenizer: Tokenizer) -> Kind:
    """The kind, by what the tokenizer does to turn tokens into text again."""
    if not tokenizer.is_fast:
        raise _untold(tokenizer, "it is not a fast one, which tells the characters of each token")
    decoder: Any = cast(Any, tokenizer).backend_tokenizer.decoder
    if decoder is None:
        return "words"
    steps = _steps(json.loads(decoder.__getstate__()))
    names = {step["type"] for step in steps}
    if "ByteLevel" in names:
        return "bytes"
    if "Metaspace" in names or any(step.get("pattern") == {"String": _SPACE} for step in steps):
        return "pieces"
    if "WordPiece" in names:
        return "words"
    raise _untold(tokenizer, f"its decoder is {', '.join(sorted(names))}")


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _untold(tokenizer: Tokenizer, why: str) -> TokenizerMismatch:
    return TokenizerMismatch(
        f"cannot tell which bytes the tokens of this {type(tokenizer).__name__} stand for: {why}.",
        details=["known: byte-level BPE, sentence pieces (BPE or Unigram), word pieces, word-level vocabularies"],
        hint="Compare models whose tokenizers are of these kinds.",
    )


def _piece(kind: Kind, token: str) -> bytes:
    if kind == "bytes":
        table = _byte_table()
        return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    if kind == "words":
        return token.removeprefix("##").encode()
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _unknown_tokens(tokenizer: Tokenizer) -> set[str]:
    """The unknown token, as the tokenizer calls it and as its model does."""
    from tokenizers import models

    model: Any = cast(Any, tokenizer).backend_tokenizer.model
    named: set[str | None] = {cast("str | None", tokenizer.unk_token)}
    if isinstance(model, models.BPE | models.WordPiece | models.WordLevel):
        named.add(model.unk_token)
    return {token for token in named if token is not None} & tokenizer.get_vocab().keys()


@cache
def _byte_table() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves (Radford 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _whole_characters(raw: bytes) -> tuple[int, int]:
    """The stretch of `raw` that is text: without the rest of a character at its start and a part of one at its end."""
    start = next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), len(raw))
    try:
        raw[start:].decode()
    except UnicodeDecodeError as error:
        return start, start + error.start
    return start, len(raw)


def _leading_spaces(raw: bytes) -> int:
    return len(raw) - len(raw.lstrip(b" "))


def _in_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> Int[np.ndarray, "tokens two"]:
    """Characters as bytes."""
    before = np.append(0, np.cumsum([len(c.encode()) for c in text], dtype=np.int64))
    return before[np.asarray(offsets, dtype=np.int64).reshape(-1, 2)]
