"""Tokens as text: what each one contributes, spaces included, and the windows of exemplars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from crosscoder.activations import ROLES
from crosscoder.analysis.exemplars import Entries
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.huggingface import Tokenizer

_WORD_START = "\u2581"
"""SentencePiece's sign for a space; decoding a single token would drop it."""


def token_pieces(tokenizer: Tokenizer, token_ids: Iterable[int]) -> dict[int, str]:
    """The text of every token; U+FFFD where a token is only part of a character."""
    pieces: dict[int, str] = {}
    for token in set(token_ids):
        written = tokenizer.convert_ids_to_tokens(token)
        if isinstance(written, str) and written.startswith(_WORD_START):
            pieces[token] = written.replace(_WORD_START, " ")
        else:
            pieces[token] = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return pieces


def exemplar_table(entries: Entries, text: AnalysisSet, tokenizer: Tokenizer, *, before: int) -> pa.Table:
    """One row per exemplar: where it lies, its value, and the window around it token by token.

    `values` has null for tokens that are no rows (dropped ones). `first_position` is the window's first token.
    """
    windows = _windows(entries, text, before=before)
    pieces, place = _pieces_of(tokenizer, windows.token_ids)
    roles = pa.array(ROLES, pa.string()).take(pa.array(entries.role))
    return pa.table(
        {
            "latent": pa.array(entries.latent.astype(np.int32)),
            "rank": pa.array(entries.rank.astype(np.int32)),
            "context": pa.array(entries.context),
            "position": pa.array(entries.position.astype(np.int32)),
            "value": pa.array(entries.value.astype(np.float32)),
            "role": roles,
            "first_position": pa.array(windows.first.astype(np.int32)),
            "token_ids": windows.lists(pa.array(windows.token_ids.astype(np.int32))),
            "pieces": windows.lists(pieces.take(pa.array(place))),
            "values": windows.lists(pa.array(windows.values.astype(np.float32), from_pandas=True)),
        }
    )


@dataclass(frozen=True)
class _Windows:
    """The windows of all entries laid end to end, cut to their contexts; `first` is the position each begins at."""

    first: Int[np.ndarray, "entries"]
    offsets: Int[np.ndarray, "entries_and_one"]
    token_ids: Int[np.ndarray, "tokens"]
    values: Float[np.ndarray, "tokens"]

    def lists(self, flat: pa.Array) -> pa.Array:
        """A column with one list per entry."""
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), flat)


def _windows(entries: Entries, text: AnalysisSet, *, before: int) -> _Windows:
    start, stop = (text.pointers.numpy()[entries.context + one] for one in (0, 1))
    origin = entries.position - before
    first = np.maximum(0, origin)
    length = np.minimum(stop - start, origin + entries.window.shape[1]) - first
    offsets = np.append(0, np.cumsum(length))
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length)
    token_ids = text.token_ids.numpy()[np.repeat(start + first, length) + within]
    values = entries.window[np.repeat(np.arange(len(length)), length), np.repeat(first - origin, length) + within]
    return _Windows(first, offsets, token_ids, values)


def _pieces_of(
    tokenizer: Tokenizer, token_ids: Int[np.ndarray, "tokens"]
) -> tuple[pa.Array, Int[np.ndarray, "tokens"]]:
    """The text of every token that occurs, and for each token its place in it."""
    unique, place = np.unique(token_ids, return_inverse=True)
    pieces = token_pieces(tokenizer, unique.tolist())
    return pa.array([pieces[token] for token in unique.tolist()], pa.string()), place
