"""Tokens as text: what each one contributes, spaces included, and the windows of exemplars."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

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
    windows = [_window(entries, e, text=text, before=before) for e in range(len(entries.latent))]
    ids = [window[1] for window in windows]
    pieces = token_pieces(tokenizer, (token for window in ids for token in window))
    roles = [ROLES[role] for role in entries.role.tolist()]
    return pa.table(
        {
            "latent": pa.array(entries.latent.astype(np.int32)),
            "rank": pa.array(entries.rank.astype(np.int32)),
            "context": pa.array(entries.context),
            "position": pa.array(entries.position.astype(np.int32)),
            "value": pa.array(entries.value.astype(np.float32)),
            "role": pa.array(roles, pa.string()),
            "first_position": pa.array([window[0] for window in windows], pa.int32()),
            "token_ids": pa.array(ids, pa.list_(pa.int32())),
            "pieces": pa.array([[pieces[token] for token in window] for window in ids], pa.list_(pa.string())),
            "values": pa.array([window[2] for window in windows], pa.list_(pa.float32())),
        }
    )


def _window(entries: Entries, e: int, *, text: AnalysisSet, before: int) -> tuple[int, list[int], list[float | None]]:
    """First position, token ids and values of one entry's window, cut to its context."""
    start, stop = text.pointers[int(entries.context[e]) : int(entries.context[e]) + 2].tolist()
    origin = int(entries.position[e]) - before
    first, last = max(0, origin), min(stop - start, origin + entries.window.shape[1])
    values = entries.window[e, first - origin : last - origin].tolist()
    ids = text.token_ids[start + first : start + last].tolist()
    return first, ids, [None if value != value else value for value in values]
