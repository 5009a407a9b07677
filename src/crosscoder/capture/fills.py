"""Which contexts each fill of a buffer holds: settled by the text alone, so that it is known ahead of any model.

A fill takes whole contexts until the next one might not fit, or until an analysis set ends. Every context says how many
rows it gives, and so the end of a fill, and the text's place there, are known without a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crosscoder.activations import State
from crosscoder.capture.padding import Padded, padded_batches
from crosscoder.capture.readers import ContextReader
from crosscoder.errors import TextError

_BARREN = 1000
"""So many contexts without a single row are an error."""


@dataclass(frozen=True)
class Stretch:
    """Some forward passes of a fill; `end` is the text's place after the fill where it is the last of it."""

    batches: tuple[Padded, ...]
    end: State | None = None


@dataclass(frozen=True)
class FillPlan:
    """How fills are cut: `capacity` rows, contexts of up to `context_length`, sorted by length within a pool.

    `forward_tokens` is the size of one forward pass; `pin` puts what a GPU will fetch into pinned memory.
    """

    capacity: int
    context_length: int
    pool_tokens: int
    forward_tokens: int
    pin: bool = False

    def stretches(self, reader: ContextReader) -> Iterator[Stretch]:
        """The stretches of one fill after the other, endlessly, from where the reader is."""
        while True:
            yield from self._fill(reader)

    def _fill(self, reader: ContextReader) -> Iterator[Stretch]:
        num_rows = num_contexts = 0
        ended = False
        while not ended:
            pool = reader.pool(min(self.capacity - num_rows, self.pool_tokens))
            num_contexts += len(pool)
            num_rows += sum(context.num_rows for _, context in pool)
            if num_rows == 0 and (not pool or num_contexts > _BARREN):
                raise TextError(
                    f"no token of {num_contexts:,} contexts became a row.", hint="Drop fewer tokens in text.drop."
                )
            ended = not pool or self.capacity - num_rows < self.context_length
            batches = padded_batches(pool, most_tokens=self.forward_tokens)
            ready = tuple(batch.pinned() for batch in batches) if self.pin else tuple(batches)
            yield Stretch(ready, reader.state_dict() if ended else None)
