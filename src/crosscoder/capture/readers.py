"""Numbered contexts, a pool at a time: endless from a corpus, and round after round from an analysis set."""

from __future__ import annotations

from typing import Protocol

from crosscoder.activations import State
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context
from crosscoder.capture.corpus import Corpus


class ContextReader(Protocol):
    """Where a stream gets its contexts from."""

    def pool(self, most_tokens: int) -> list[tuple[int, Context]]:
        """The next contexts with their numbers, together at most `most_tokens` long, but at least one.

        An empty pool marks the end of an analysis set; the pool after it begins anew.
        """
        ...

    def state_dict(self) -> State:
        """Where the next context begins."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        ...


def reader_of(text: Corpus | AnalysisSet, aligner: Aligner | None = None) -> ContextReader:
    """A reader at the beginning of `text`; a corpus is read for training. With `aligner`, in all tokenizations."""
    reader = CorpusReader(text) if isinstance(text, Corpus) else SetReader(text)
    return reader if aligner is None else AlignedReader(reader, aligner)


class AlignedReader:
    """The contexts of another reader, with their readings in other tokenizations."""

    def __init__(self, reader: ContextReader, aligner: Aligner) -> None:
        self._reader, self._aligner = reader, aligner

    def pool(self, most_tokens: int) -> list[tuple[int, Context]]:
        """The other reader's next contexts; they give fewer rows."""
        return [(number, self._aligner(context)) for number, context in self._reader.pool(most_tokens)]

    def state_dict(self) -> State:
        """Where the next context begins."""
        return self._reader.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        self._reader.load_state_dict(state)


class CorpusReader:
    """Training contexts, numbered from 0 on."""

    def __init__(self, corpus: Corpus) -> None:
        self._stream = corpus.training()
        self._length = corpus.context_length
        self._count = 0

    def pool(self, most_tokens: int) -> list[tuple[int, Context]]:
        """The next contexts, together at most `most_tokens` long, but at least one."""
        pool, size = [], 0
        while not pool or size + self._length <= most_tokens:
            context = next(self._stream)
            pool.append((self._count, context))
            self._count += 1
            size += len(context)
        return pool

    def state_dict(self) -> State:
        """Where the next context begins."""
        return {"contexts": self._count, "corpus": self._stream.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        self._count = state["contexts"]
        self._stream.load_state_dict(state["corpus"])


class SetReader:
    """The contexts of an analysis set, under their numbers in it."""

    def __init__(self, contexts: AnalysisSet) -> None:
        self._set = contexts
        self._next = 0

    def pool(self, most_tokens: int) -> list[tuple[int, Context]]:
        """The next contexts, together at most `most_tokens` long, but at least one; none at the end of the set."""
        pool, size = [], 0
        while self._next < self._set.num_contexts:
            context = self._set.context(self._next)
            if pool and size + len(context) > most_tokens:
                return pool
            pool.append((self._next, context))
            self._next += 1
            size += len(context)
        if not pool:
            self._next = 0
        return pool

    def state_dict(self) -> State:
        """Where the next context begins."""
        return {"next": self._next}

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        self._next = state["next"]
