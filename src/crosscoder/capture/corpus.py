"""The corpus: data sets mixed by tokens, split by document hash, packed into contexts, with an explicit cursor.

Mixing is deterministic: the next document comes from the data set that is furthest behind its share of the tokens. Each
data set is read in a permutation that depends on (seed, data set, epoch) alone; when it runs out, its next epoch
begins and is logged. A document is held out when its hash, salted with the seed, falls into the first `fraction` of
the range.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
from xxhash import xxh3_64_intdigest

from crosscoder.activations import State
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context, DocumentId, Encoder, Tokens, assemble
from crosscoder.capture.documents import DocumentSet
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.text import Alignment, Document, TextConfig
from crosscoder.errors import TextError

_log = logging.getLogger(__name__)

Part = Literal["training", "held_out"]
MUCH_LOST = 0.5
"""A share of a model's tokens without rows that is worth a warning."""


class Corpus:
    """All the text of a run: endless training contexts, and the held-out analysis set.

    >>> corpus = Corpus(config, tokenizer, seed=0)   # doctest: +SKIP
    >>> context = next(corpus.training())            # doctest: +SKIP
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, *, seed: int) -> None:
        if not tokenizer.is_fast:
            raise TextError(
                f"expected a fast tokenizer, which tells the characters of each token; got {type(tokenizer).__name__}.",
                hint="Save the tokenizer with a tokenizer.json, or use a model that has one.",
            )
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.datasets = tuple(DocumentSet(dataset) for dataset in config.mix)
        self.encoder = Encoder(deepcopy(tokenizer), config.drop)  # used by threads, while its owner may change his

    @property
    def context_length(self) -> int:
        """The longest a context can be."""
        return self.config.context_length

    @property
    def vocabulary(self) -> str:
        """The hash of the tokenizer's vocabulary."""
        return vocabulary_hash(self.tokenizer)

    @property
    def alignment(self) -> Alignment:
        """Whether its rows may be aligned to other tokenizers."""
        return self.config.alignment

    def training(self) -> ContextStream:
        """Endless contexts of the documents that are not held out."""
        return ContextStream(self, part="training")

    def held_out(self, aligner: Aligner | None = None) -> AnalysisSet:
        """The analysis set: contexts of held-out documents, each document once, up to the configured size.

        With an `aligner`, only tokens that are aligned with those of all models are kept.
        """
        contexts, size = [], 0
        for context in ContextStream(self, part="held_out"):
            contexts.append(context if aligner is None else aligner(context))
            size += len(context)
            if size >= self.config.held_out.num_tokens:
                break
        if not contexts:
            raise TextError(
                f"no document fell into the held-out {self.config.held_out.fraction:.2%} of the text.",
                details=[f"{len(data):,} documents in {data.config.dataset}" for data in self.datasets],
                hint="Raise text.held_out.fraction, or give the text as more and shorter documents.",
            )
        counts = None if aligner is None else aligner.count(contexts)
        if counts is not None:
            log = _log.warning if max(counts.lost.values()) > MUCH_LOST else _log.info
            log("held-out text in all tokenizations: %s", counts.in_words())
        return AnalysisSet.of(contexts, vocabulary=self.vocabulary, aligned=counts)

    def is_held_out(self, document: Document) -> bool:
        """On which side of the split a document is."""
        place = xxh3_64_intdigest(document.hash.encode(), seed=_seed("split", self.seed)) / 2**64
        return place < self.config.held_out.fraction


@dataclass
class _Place:
    """How far one data set has been read; `served` counts its tokens, over all epochs."""

    epoch: int = 0
    number: int = 0
    served: int = 0


@dataclass
class _Open:
    """A document of which `offset` tokens have been used."""

    dataset: int
    row: int
    tokens: Tokens
    id: DocumentId
    offset: int = 0


class ContextStream(Iterator[Context]):
    """Contexts of one part of a corpus, one by one; `state_dict` is where the next one begins."""

    def __init__(self, corpus: Corpus, *, part: Part) -> None:
        self._corpus = corpus
        self._held_out = part == "held_out"
        self._places = [_Place() for _ in corpus.datasets]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._open: _Open | None = None
        self._opening = corpus.encoder.opening()
        self._taken: set[str] = set()
        self._room = corpus.config.context_length - (0 if self._opening is None else 1)

    def __next__(self) -> Context:
        pieces: list[tuple[Tokens, DocumentId]] = []
        room = self._room
        while room > 0 and (current := self._current()) is not None:
            piece = current.tokens.window(current.offset, current.offset + room)
            pieces.append((piece, current.id))
            current.offset += len(piece)
            room -= len(piece)
            if current.offset == len(current.tokens):
                self._open = None
            if self._corpus.config.packing == "document":
                break
        if not pieces:
            raise StopIteration
        return assemble(self._opening, pieces)

    def state_dict(self) -> State:
        """Where the next context begins: JSON values, exact."""
        current = self._open
        return {
            "datasets": [{"epoch": p.epoch, "number": p.number, "served": p.served} for p in self._places],
            "open": current and {"dataset": current.dataset, "row": current.row, "offset": current.offset},
        }

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        if len(state["datasets"]) != len(self._places):
            raise TextError(
                f"expected the place in a mix of {len(self._places)} data sets; got one in {len(state['datasets'])}.",
                hint="The text was changed since: start a new run.",
            )
        self._places = [_Place(**place) for place in state["datasets"]]
        there = state["open"]
        self._open = None
        if there is not None:
            self._open = self._encode(there["dataset"], there["row"])
            self._open.offset = there["offset"]

    def _current(self) -> _Open | None:
        """The document being read; the next one when none is open, None when held-out text has run out."""
        while self._open is None or len(self._open.tokens) == 0:
            drawn = self._draw()
            if drawn is None:
                return None
            self._open = drawn
        return self._open

    def _draw(self) -> _Open | None:
        """The next document of the data set that is furthest behind its share."""
        mix = self._corpus.config.mix
        for dataset in sorted(range(len(mix)), key=lambda d: self._places[d].served / mix[d].weight):
            row = self._next_row(dataset)
            if row is not None:
                drawn = self._encode(dataset, row)
                self._places[dataset].served += len(drawn.tokens)
                return drawn
        return None

    def _next_row(self, dataset: int) -> int | None:
        """The next row of this part; held-out text has one epoch, training text begins another."""
        place, documents = self._places[dataset], self._corpus.datasets[dataset]
        for _ in range(2 * len(documents) + 1):
            if place.number == len(documents):
                if self._held_out:
                    return None
                self._next_epoch(dataset)
            row = int(self._order(dataset)[place.number])
            place.number += 1
            if self._belongs(documents[row]):
                return row
        raise TextError(
            f"no document of {documents.config.dataset} is left for training: {len(documents):,} in all, "
            "and every one is empty or held out.",
            hint="Give more documents, or lower text.held_out.fraction.",
        )

    def _belongs(self, document: Document) -> bool:
        """Whether a document is of this part; a held-out text that occurs again is taken once."""
        if not document.content or self._corpus.is_held_out(document) != self._held_out:
            return False
        repeated = document.hash in self._taken
        if self._held_out:
            self._taken.add(document.hash)
        return not repeated

    def _next_epoch(self, dataset: int) -> None:
        place = self._places[dataset]
        place.epoch, place.number = place.epoch + 1, 0
        _log.info("%s ran out: epoch %d begins", self._corpus.datasets[dataset].config.dataset, place.epoch + 1)

    def _order(self, dataset: int) -> np.ndarray:
        """The permutation of the data set's current epoch."""
        epoch = self._places[dataset].epoch
        kept = self._orders.get(dataset)
        if kept is None or kept[0] != epoch:
            seed = _seed("order", self._corpus.seed, self._corpus.config.mix[dataset].dataset, dataset, epoch)
            kept = epoch, np.random.Generator(np.random.PCG64(seed)).permutation(len(self._corpus.datasets[dataset]))
            self._orders[dataset] = kept
        return kept[1]

    def _encode(self, dataset: int, row: int) -> _Open:
        document = self._corpus.datasets[dataset][row]
        separator = self._corpus.config.packing == "contiguous"
        tokens = self._corpus.encoder.encode(document, separator=separator)
        return _Open(dataset, row, tokens, DocumentId(document.hash, document.dataset))


def _seed(*parts: object) -> int:
    """A seed from names and numbers, the same in every process."""
    return xxh3_64_intdigest("/".join(map(str, parts)).encode())
