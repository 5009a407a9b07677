"""The live stream: activations computed from text as they are needed, shuffled through a buffer that really refills.

    fill:   read contexts until the next might not fit, run the models on them, keep their rows
    serve:  `passes` times, a fresh permutation of all rows of the fill
    then    the next fill, from where the text was left

A batch may end one fill and begin the next, so every row of a fill is served exactly `passes` times. The place in the
stream is (the text's place at the start of the fill, the fill's number, rows served) and belongs to the last batch
that was delivered; permutations depend on (seed, fill, pass) alone, so resuming replays at most one fill and gives the
same batches.

Text is read, tokenised and padded by a thread of its own, ahead of the models. Where it has got to is nobody's place:
places are those of fills that were served, and going elsewhere starts another thread there. It ends with the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from crosscoder.activations import Batch, Rows, State
from crosscoder.capture.ahead import Ahead
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.buffer import RowBuffer, bytes_per_row
from crosscoder.capture.corpus import Corpus
from crosscoder.capture.fills import FillPlan, Stretch
from crosscoder.capture.harvest import Finite, Harvest, check_sources, storage_dtype
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.readers import ContextReader, reader_of
from crosscoder.capture.vocabularies import other_vocabularies
from crosscoder.errors import ConfigError, RunConflict
from crosscoder.progress import Progress, silent
from crosscoder.sources import SourceSet

_log = logging.getLogger(__name__)

_POOL = 64
"""Contexts are sorted by length among this many forward batches."""
_AHEAD = 2
"""Pools of contexts that are read, tokenised and padded ahead of the models."""


@dataclass(frozen=True)
class _Place:
    """The text's place at the start of a fill, the fill's number, and how many of its rows were served."""

    text: State
    fill: int = 0
    served: int = 0


class ActivationStream:
    """Packed activations of `sources`, live from `models` reading a corpus or an analysis set.

    >>> stream = ActivationStream({"base": studied}, sources, corpus, buffer_bytes=2**30, seed=0)  # doctest: +SKIP
    >>> batch = next(stream.batches(4096))                                                         # doctest: +SKIP
    """

    def __init__(
        self,
        models: Mapping[str, StudiedModel],
        sources: SourceSet,
        text: Corpus | AnalysisSet,
        *,
        buffer_bytes: int = 2**30,
        batch_tokens: int = 4096,
        passes: int = 1,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        check_sources(models, sources)
        used = {alias: models[alias] for alias in sources.models}
        others = other_vocabularies(used, text)
        self._harvest = Harvest(used, sources, batch_tokens, storage_dtype(used), others)
        _check_length({alias: used[alias] for alias in used if alias not in others}, text)
        self._aligner = Aligner.of(used, vocabulary=text.vocabulary) if others else None
        self._text = text
        self._capacity = self._rows_in(buffer_bytes)
        self._passes, self._seed = passes, seed
        self._progress = progress
        self._buffer: RowBuffer | None = None
        self._order: tuple[int, int, Tensor] | None = None
        self._place = _Place(self._reader().state_dict())
        self._next_text = self._place.text
        self._ahead: Ahead[Stretch] | None = None

    @property
    def sources(self) -> SourceSet:
        """The sources, in the order in which rows pack them."""
        return self._harvest.sources

    @property
    def bytes_per_row(self) -> int:
        """What one row takes in the buffer."""
        return bytes_per_row(self.sources.width, self._harvest.dtype)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Shuffled rows, endlessly; goes on from the last batch delivered."""
        while True:
            parts: list[Batch] = []
            missing = batch_size
            while missing > 0:
                parts.append(self._take(missing))
                missing -= len(parts[-1].x)
            yield _joined(parts)

    def contexts(self) -> Iterator[Batch]:
        """Rows in text order from the text's beginning, some whole contexts at a time; `batches` is not disturbed."""
        reader = self._reader()
        while pool := reader.pool(self._harvest.batch_tokens):
            parts = list(self._harvest.rows(pool))
            if parts:
                yield _in_text_order(_joined(parts))

    def state_dict(self) -> State:
        """The place after the last batch that was delivered: JSON values."""
        return {
            "settings": self._settings(),
            "text": self._place.text,
            "fill": self._place.fill,
            "served": self._place.served,
        }

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave; another fill than the one in memory is computed again when needed."""
        if state["settings"] != self._settings():
            raise RunConflict(
                "expected the place in a stream with these settings; got one in another.",
                details=[f"here   {self._settings()}", f"there  {state['settings']}"],
                hint="Give the stream the settings it had, or start a new run.",
            )
        place = _Place(state["text"], state["fill"], state["served"])
        if (place.text, place.fill) != (self._place.text, self._place.fill):
            self._forget()
        self._place = place

    def _settings(self) -> State:
        """What, beside the text, decides which rows a fill holds and in which order they are served."""
        return {
            "sources": list(self.sources.keys),
            "rows": self._capacity,
            "batch_tokens": self._harvest.batch_tokens,
            "passes": self._passes,
            "seed": self._seed,
        } | self._tokenizers()

    def _tokenizers(self) -> State:
        """Which other tokenizers, up to which length, decide with the text which tokens become rows; none as a rule."""
        readers = {} if self._aligner is None else self._aligner.readers
        return {"aligned": {key: reader.most_tokens for key, reader in sorted(readers.items())}} if readers else {}

    def _reader(self) -> ContextReader:
        """A reader at the beginning of the text."""
        return reader_of(self._text, self._aligner)

    def _take(self, most: int) -> Batch:
        """Up to `most` rows of the current pass over the buffer."""
        buffer = self._filled()
        done, start = divmod(self._place.served, buffer.num_rows)
        chosen = self._permutation(done, buffer.num_rows)[start : start + most]
        self._place = replace(self._place, served=self._place.served + len(chosen))
        batch = buffer.take(chosen)
        if self._place.served == self._passes * buffer.num_rows:
            self._place = _Place(self._next_text, self._place.fill + 1)
            self._forget()
        return batch

    def _forget(self) -> None:
        if self._buffer is not None:
            self._buffer.clear()
        self._order = None

    def _filled(self) -> RowBuffer:
        """The buffer, with the rows of the current fill."""
        if self._buffer is None:
            self._buffer = RowBuffer(
                self._capacity, self.sources.width, dtype=self._harvest.dtype, device=self._harvest.device
            )
        if self._buffer.num_rows == 0:
            self._fill(self._buffer)
            _log.info("fill %d of the buffer: %d rows", self._place.fill + 1, self._buffer.num_rows)
        return self._buffer

    def _fill(self, buffer: RowBuffer) -> None:
        """The rows of the fill that begins at the current place; on any error the buffer is left empty."""
        try:
            end = None
            while end is None:
                stretch = self._text_ahead().take()
                self._read(stretch, buffer)
                end = stretch.end
        except BaseException:
            self._forget()
            self._read_anew()
            raise
        self._next_text = end
        self._progress("reading activations", buffer.num_rows, buffer.num_rows)

    def _read(self, stretch: Stretch, buffer: RowBuffer) -> None:
        finite: list[Finite] = []
        for batch in stretch.batches:
            finite.append(self._harvest.read(batch, buffer.reserve(batch.rows)))
            self._progress("reading activations", buffer.num_rows, self._capacity)
        self._harvest.finish(finite)

    def _text_ahead(self) -> Ahead[Stretch]:
        """The contexts of the fills from the current place on, which a thread reads ahead."""
        if self._ahead is not None and self._next_text != self._place.text:
            self._read_anew()
        if self._ahead is None:
            reader = self._reader()
            reader.load_state_dict(self._place.text)
            plan = FillPlan(
                capacity=self._capacity,
                context_length=self._text.context_length,
                pool_tokens=_POOL * self._harvest.batch_tokens,
                forward_tokens=self._harvest.forward_tokens,
                pin=self._harvest.device.type == "cuda",
            )
            self._ahead, self._next_text = Ahead(plan.stretches(reader), depth=_AHEAD), self._place.text
        return self._ahead

    def _read_anew(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _permutation(self, done: int, num_rows: int) -> Tensor:
        """The order of pass `done` over the current fill."""
        if self._order is None or self._order[:2] != (self._place.fill, done):
            seed = xxh3_64_intdigest(f"rows/{self._seed}/{self._place.fill}/{done}".encode()) >> 1
            order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
            self._order = self._place.fill, done, order.to(self._harvest.device)
        return self._order[2]

    def _rows_in(self, buffer_bytes: int) -> int:
        rows = buffer_bytes // self.bytes_per_row
        least = self._text.context_length * self.bytes_per_row
        if rows < self._text.context_length:
            raise ConfigError(
                f"expected a buffer that holds at least one context of {self._text.context_length:,} rows; "
                f"{buffer_bytes:,} bytes hold {rows:,}.",
                details=[f"one row takes {self.bytes_per_row:,} bytes"],
                hint=f"Give it at least {least:,} bytes, or shorten the contexts.",
            )
        return rows


def _check_length(models: Mapping[str, StudiedModel], text: Corpus | AnalysisSet) -> None:
    for alias, studied in models.items():
        if studied.max_positions is not None and text.context_length > studied.max_positions:
            raise ConfigError(
                f"expected contexts of at most {studied.max_positions:,} tokens, for which {alias!r} was made; "
                f"got {text.context_length:,}.",
                hint=f"Set text.context_length to {studied.max_positions} or less.",
            )


def _joined(parts: list[Batch]) -> Batch:
    """Several batches as one, in fp32."""
    if len(parts) == 1:
        return Batch(parts[0].x.float(), parts[0].rows)
    rows = [part.rows for part in parts if part.rows is not None]
    columns = (torch.cat([getattr(row, name) for row in rows]) for name in ("context", "position", "role"))
    return Batch(torch.cat([part.x.float() for part in parts]), Rows(*columns))


def _in_text_order(batch: Batch) -> Batch:
    """The same rows by context, then position."""
    rows = batch.rows
    assert rows is not None
    order = torch.argsort(rows.context * (1 + rows.position.max()) + rows.position)
    return Batch(batch.x[order], Rows(rows.context[order], rows.position[order], rows.role[order].long()))
