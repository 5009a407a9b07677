"""Contexts side by side, as one forward pass takes them, and which of their tokens become rows.

Contexts of similar length go together, padded on the right. All of this is arithmetic on token ids: it needs no model,
so that it can be done ahead of the forward pass, by another thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from crosscoder.activations import Rows
from crosscoder.capture.contexts import Context

NumberedContext = tuple[int, Context]


@dataclass(frozen=True)
class PaddedReading:
    """The same contexts in another tokenization, padded by themselves; fields as in `Padded`."""

    ids: Int[Tensor, "contexts positions"]
    mask: Int[Tensor, "contexts positions"] | None
    picked: Int[Tensor, "rows"] | None

    def pinned(self) -> PaddedReading:
        """The same in memory that a GPU fetches from without the CPU waiting."""
        ids, mask, picked = (None if part is None else part.pin_memory() for part in (self.ids, self.mask, self.picked))
        assert ids is not None
        return PaddedReading(ids, mask, picked)


@dataclass(frozen=True)
class Padded:
    """The contexts of one forward pass; row r is the token at flat place `picked[r]`.

    `mask` is 1 at tokens and 0 at padding, None where nothing is padded; `picked` is None where every place is a row.
    `readings` are the contexts in other tokenizations, by the hash of their vocabularies.
    """

    ids: Int[Tensor, "contexts positions"]
    mask: Int[Tensor, "contexts positions"] | None
    picked: Int[Tensor, "rows"] | None
    rows: Rows
    readings: Mapping[str, PaddedReading] = field(default_factory=dict[str, PaddedReading])

    @property
    def num_rows(self) -> int:
        """How many rows it gives."""
        return len(self.rows.position)

    def pinned(self) -> Padded:
        """The same in memory that a GPU fetches from without the CPU waiting."""
        pin = [None if part is None else part.pin_memory() for part in (self.ids, self.mask, self.picked)]
        rows = Rows(*(column.pin_memory() for column in (self.rows.context, self.rows.position, self.rows.role)))
        assert pin[0] is not None
        return Padded(pin[0], pin[1], pin[2], rows, {key: each.pinned() for key, each in self.readings.items()})


def padded_batches(contexts: Sequence[NumberedContext], *, most_tokens: int) -> Iterator[Padded]:
    """All of `contexts`, the longest first; padded, a batch holds at most `most_tokens` tokens or is one context.

    Batches that would give no row are left out.
    """
    for group in _groups(contexts, most_tokens):
        batch = _padded(group)
        if batch.num_rows > 0:
            yield batch


def _groups(contexts: Sequence[NumberedContext], most_tokens: int) -> Iterator[list[NumberedContext]]:
    group: list[NumberedContext] = []
    for numbered in sorted(contexts, key=lambda numbered: -len(numbered[1])):
        longest = len(group[0][1]) if group else 0
        if group and longest * (len(group) + 1) > most_tokens:
            yield group
            group = []
        group.append(numbered)
    if group:
        yield group


def _padded(group: Sequence[NumberedContext]) -> Padded:
    lengths = np.array([len(context) for _, context in group])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids, kept, roles = (_side_by_side(group, column, real) for column in ("ids", "kept", "roles"))
    picked = kept.reshape(-1).nonzero()[0]
    context, position = np.divmod(picked, real.shape[1])
    numbers = np.array([number for number, _ in group])
    rows = Rows(*map(torch.from_numpy, (numbers[context], position, roles.reshape(-1)[picked])))
    return Padded(
        ids=torch.from_numpy(ids).long(),
        mask=None if real.all() else torch.from_numpy(real).long(),
        picked=None if len(picked) == real.size else torch.from_numpy(picked),
        rows=rows,
        readings={key: _padded_reading(group, key, context, position) for key in group[0][1].readings},
    )


def _padded_reading(
    group: Sequence[NumberedContext], key: str, context: np.ndarray, position: np.ndarray
) -> PaddedReading:
    """One other tokenization; row r is the token that is aligned with position `position[r]` of `context[r]`."""
    readings = [numbered[1].readings[key] for numbered in group]
    lengths = np.array([len(reading.ids) for reading in readings])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = np.concatenate([reading.ids for reading in readings])
    starts = np.cumsum([0, *(len(reading.places) for reading in readings[:-1])])
    places = np.concatenate([reading.places for reading in readings])[starts[context] + position].astype(np.int64)
    return PaddedReading(
        ids=torch.from_numpy(ids),
        mask=None if real.all() else torch.from_numpy(real).long(),
        picked=torch.from_numpy(context * real.shape[1] + places),
    )


def _side_by_side(group: Sequence[NumberedContext], column: str, real: np.ndarray) -> np.ndarray:
    """One column of all contexts, 0 where there is no token."""
    values = [getattr(context.tokens, column) for _, context in group]
    padded = np.zeros(real.shape, dtype=values[0].dtype)
    padded[real] = np.concatenate(values)
    return padded
