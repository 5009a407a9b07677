"""Exemplars: for every latent, the contexts in which it is most active, with the tokens around and their values.

One pass, bounded memory: per latent at most `num_exemplars` entries are held, each the latent's largest value in one
context, with the values in a window around it. An entry that could not enter is dropped as soon as it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from crosscoder.activations import Batch, Rows
from crosscoder.codes import SparseCode
from crosscoder.errors import SourceMismatch


@dataclass(frozen=True)
class Entries:
    """Some (latent, context) pairs: the position and value of the latent's maximum there, and the window around it.

    `window[e, j]` is the value at `position + j − before`; NaN where no row is (beyond the context, or dropped).
    """

    latent: Int[np.ndarray, "entries"]
    context: Int[np.ndarray, "entries"]
    position: Int[np.ndarray, "entries"]
    role: Int[np.ndarray, "entries"]
    value: Float[np.ndarray, "entries"]
    window: Float[np.ndarray, "entries span"]

    def take(self, index: Int[np.ndarray, "some"]) -> Entries:
        """Some of the entries, in that order."""
        return Entries(
            self.latent[index],
            self.context[index],
            self.position[index],
            self.role[index],
            self.value[index],
            self.window[index],
        )

    @cached_property
    def rank(self) -> Int[np.ndarray, "entries"]:
        """The place of each entry among those of its latent, which must be together."""
        starts = np.flatnonzero(np.append(True, self.latent[1:] != self.latent[:-1])[: len(self.latent)])
        lengths = np.diff(np.append(starts, len(self.latent)))
        return np.arange(len(self.latent)) - np.repeat(starts, lengths)


class Exemplars:
    """The top contexts of every latent; an observer of a pass whose rows say where they lie."""

    def __init__(self, num_latents: int, *, num_exemplars: int = 10, before: int = 24, after: int = 8) -> None:
        self.num_latents, self.num_exemplars = num_latents, num_exemplars
        self.before, self.after = before, after
        slots = (num_latents, num_exemplars)  # by latent, best first; a value of 0 is an empty slot
        self._context, self._position, self._role = (np.zeros(slots, dtype=np.int64) for _ in range(3))
        self._value = np.zeros(slots)
        self._window = np.zeros((*slots, before + 1 + after), dtype=np.float32)

    @property
    def entries(self) -> Entries:
        """The exemplars by latent, best first."""
        return self._held(np.arange(self.num_latents))

    @torch.no_grad()
    def update(self, batch: Batch, code: SparseCode) -> None:
        """Take in the maxima of one batch of whole contexts."""
        if batch.rows is None:
            raise SourceMismatch(
                "exemplars need to know where each row lies; these activations do not say.",
                hint="Read them from a stream over text, which gives Batch.rows.",
            )
        lookup = _Lookup(batch.rows, code)
        found = lookup.maxima()
        found = found[lookup.values[found] > self._value[lookup.latents[found], -1]]
        if len(found):
            self._merge(lookup.entries(found, before=self.before, after=self.after))

    def _merge(self, new: Entries) -> None:
        """Keep the best of what is held and what is new, for the latents of `new`; of one context the larger entry."""
        touched = np.unique(new.latent)
        both = _concatenated(self._held(touched), new)
        both = both.take(np.lexsort((both.position, -both.value, both.context, both.latent)))
        same = (both.latent[1:] == both.latent[:-1]) & (both.context[1:] == both.context[:-1])
        both = both.take(np.flatnonzero(np.append(True, ~same)))
        both = both.take(np.lexsort((both.context, -both.value, both.latent)))
        self._hold(both.take(np.flatnonzero(both.rank < self.num_exemplars)))

    def _held(self, latents: Int[np.ndarray, "some"]) -> Entries:
        """The entries of some latents."""
        row, rank = np.nonzero(self._value[latents] > 0)
        slot = latents[row], rank
        places = self._context[slot], self._position[slot], self._role[slot]
        return Entries(slot[0], *places, self._value[slot], self._window[slot])

    def _hold(self, entries: Entries) -> None:
        """Fill the slots of these latents, of which none loses an entry by it."""
        slot = entries.latent, entries.rank
        self._context[slot], self._position[slot], self._role[slot] = entries.context, entries.position, entries.role
        self._value[slot], self._window[slot] = entries.value, entries.window


class _Lookup:
    """One batch's code with its rows' places: finds maxima per context and the values around a place."""

    def __init__(self, rows: Rows, code: SparseCode) -> None:
        self.context, self.position, self.role = (
            part.long().cpu().numpy() for part in (rows.context, rows.position, rows.role)
        )
        self.row_ids, self.latents = code.row_ids.cpu().numpy(), code.latents.cpu().numpy()
        self.values = code.values.double().cpu().numpy()
        self.num_latents = code.num_latents
        self._stride = int(self.position.max(initial=0)) + 2
        place = self.context * self._stride + self.position
        self._by_place = np.argsort(place, kind="stable")
        self._places = place[self._by_place]
        self._pairs = self.row_ids * self.num_latents + self.latents  # sorted: rows ascend, latents within them

    def maxima(self) -> Int[np.ndarray, "some"]:
        """For every latent and context, the active pair with the largest value (the first of equals)."""
        context, position = self.context[self.row_ids], self.position[self.row_ids]
        order = np.lexsort((position, -self.values, context, self.latents))
        i, c = self.latents[order], context[order]
        first = np.append(True, (i[1:] != i[:-1]) | (c[1:] != c[:-1]))[: len(order)]
        return order[first]

    def entries(self, pairs: Int[np.ndarray, "some"], *, before: int, after: int) -> Entries:
        """The entries of some active pairs, with their windows."""
        row = self.row_ids[pairs]
        context, position, latent = self.context[row], self.position[row], self.latents[pairs]
        offsets = position[:, None] + np.arange(-before, after + 1)
        window = self._values_at(context[:, None], offsets, latent[:, None])
        return Entries(latent, context, position, self.role[row], self.values[pairs], window.astype(np.float32))

    def _values_at(self, context: np.ndarray, position: np.ndarray, latent: np.ndarray) -> np.ndarray:
        """The latent's value at each place: 0 where it is inactive, NaN where there is no row."""
        inside = (position >= 0) & (position < self._stride - 1)
        place = np.where(inside, context * self._stride + position, -1)
        at = np.searchsorted(self._places, place).clip(max=len(self._places) - 1)
        is_row = self._places[at] == place
        pair = self._by_place[at] * self.num_latents + latent
        slot = np.searchsorted(self._pairs, pair).clip(max=max(0, len(self._pairs) - 1))
        active = self._pairs[slot] == pair
        return np.where(is_row, np.where(active, self.values[slot], 0.0), np.nan)


def _concatenated(one: Entries, two: Entries) -> Entries:
    return Entries(
        np.concatenate([one.latent, two.latent]),
        np.concatenate([one.context, two.context]),
        np.concatenate([one.position, two.position]),
        np.concatenate([one.role, two.role]),
        np.concatenate([one.value, two.value]),
        np.concatenate([one.window, two.window]),
    )
