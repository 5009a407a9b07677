"""Derived sources: the differences that a set of sources asks for, taken from the stream of what models have.

The stream holds and shuffles the underlying activations; a difference costs no forward pass and no memory, and its rows
are those of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator

from crosscoder.activations import ActivationSource, Batch, State
from crosscoder.sources import SourceSet


class Derived:
    """An ActivationSource of `sources` over one of `sources.underlying`."""

    def __init__(self, source: ActivationSource, sources: SourceSet) -> None:
        self.sources = sources
        self._source = source

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The source's batches, with differences."""
        return map(self._derive, self._source.batches(batch_size))

    def contexts(self) -> Iterator[Batch]:
        """The source's contexts, with differences."""
        return map(self._derive, self._source.contexts())

    def state_dict(self) -> State:
        """The place in the source."""
        return self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go to a place in the source."""
        self._source.load_state_dict(state)

    def _derive(self, batch: Batch) -> Batch:
        return Batch(self.sources.derive(self._source.sources.unpack(batch.x)), batch.rows)


def derived(source: ActivationSource, sources: SourceSet) -> ActivationSource:
    """Activations of `sources` from those of `sources.underlying`: the same object where there is no difference."""
    return source if source.sources == sources else Derived(source, sources)
