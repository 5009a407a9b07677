"""The analysis set: held-out contexts in fixed order, with a way from a document's characters to its tokens.

On disk: `contexts.safetensors` (one entry per token, side by side, and where each context begins) and `set.json` (the
documents' hashes, the vocabulary's hash, and a hash of the token ids, which is checked on loading). Where models have
other tokenizers, only the text's own tokens are here: they spell the text, and the others' tokens follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from xxhash import xxh3_128

from crosscoder.capture.alignment import AlignmentCounts
from crosscoder.capture.contexts import Context, DocumentId, Tokens
from crosscoder.capture.text import Alignment
from crosscoder.errors import FileFormatError
from crosscoder.files import read_json, read_tensors, write_json, write_tensors

_THING = "analysis"


class Located(NamedTuple):
    """Tokens by context and position, entry by entry."""

    context: Int[Tensor, "tokens"]
    position: Int[Tensor, "tokens"]


@dataclass(frozen=True)
class AnalysisSet:
    """Contexts laid end to end; context c holds the tokens from `pointers[c]` up to `pointers[c + 1]`.

    `document` counts within `documents` (-1: of none), `char_start` and `char_end` are in that document's rendered
    text, and only tokens that are `kept` become rows.
    """

    pointers: Int[Tensor, "contexts_and_one"]
    token_ids: Int[Tensor, "tokens"]
    roles: Int[Tensor, "tokens"]
    document: Int[Tensor, "tokens"]
    char_start: Int[Tensor, "tokens"]
    char_end: Int[Tensor, "tokens"]
    kept: Bool[Tensor, "tokens"]
    documents: tuple[DocumentId, ...]
    vocabulary: str
    aligned: AlignmentCounts | None = None

    @classmethod
    def of(cls, contexts: Sequence[Context], *, vocabulary: str, aligned: AlignmentCounts | None = None) -> AnalysisSet:
        """These contexts, in this order; `aligned` where only tokens are kept that other tokenizers share."""
        numbers: dict[DocumentId, int] = {}
        for context in contexts:
            for document in context.documents:
                numbers.setdefault(document, len(numbers))
        tokens = Tokens.join([_renumbered(context, numbers) for context in contexts])
        lengths = torch.tensor([0, *(len(context) for context in contexts)])
        columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in tokens.columns()]
        return cls(lengths.cumsum(0), *columns, documents=tuple(numbers), vocabulary=vocabulary, aligned=aligned)

    @property
    def num_contexts(self) -> int:
        """How many contexts there are."""
        return len(self.pointers) - 1

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, dropped ones included."""
        return len(self.token_ids)

    @property
    def context_length(self) -> int:
        """The length of the longest context."""
        return int(self.pointers.diff().max())

    @property
    def alignment(self) -> Alignment:
        """Whether its rows are aligned to other tokenizers."""
        return "identical" if self.aligned is None else "bytes"

    @property
    def hash(self) -> str:
        """A hash of the token ids and of where contexts begin."""
        return xxh3_128(self.token_ids.numpy().tobytes() + self.pointers.numpy().tobytes()).hexdigest()

    def context(self, number: int) -> Context:
        """Context `number`; its documents are counted within the whole set."""
        start, stop = self.pointers[number : number + 2].tolist()
        return Context(Tokens(*(column[start:stop].numpy() for column in self._columns)), self.documents)

    def __iter__(self) -> Iterator[Context]:
        """All contexts in order."""
        return (self.context(number) for number in range(self.num_contexts))

    def locate(self, document_hash: str, span: tuple[int, int]) -> Located:
        """The tokens of a document that share characters with `span` (start, end); none when it is not in the set."""
        place = self._places.get(document_hash)
        if place is None:
            return Located(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        first, last, number = place
        part = slice(first, last + 1)
        inside = (self.char_start[part] < span[1]) & (self.char_end[part] > span[0]) & (self.document[part] == number)
        tokens = inside.nonzero().squeeze(-1) + first
        context = torch.searchsorted(self.pointers, tokens, right=True) - 1
        return Located(context, tokens - self.pointers[context])

    def save(self, directory: Path) -> None:
        """Writes `contexts.safetensors` and `set.json` to `directory`."""
        names = [field.name for field in fields(self)][:7]
        write_tensors(directory / "contexts.safetensors", {name: getattr(self, name) for name in names}, thing=_THING)
        content = {
            "format": f"crosscoder.{_THING}/1",
            "num_contexts": self.num_contexts,
            "num_tokens": self.num_tokens,
            "hash": self.hash,
            "vocabulary": self.vocabulary,
            "aligned": None if self.aligned is None else self.aligned.to_json(),
            "documents": [{"hash": document.hash, "dataset": document.dataset} for document in self.documents],
        }
        write_json(directory / "set.json", content)

    @classmethod
    def load(cls, directory: Path) -> AnalysisSet:
        """The set that `save` wrote to `directory`; raises FileFormatError when its tokens are not the same."""
        content = read_json(directory / "set.json", thing=_THING)
        tensors = read_tensors(directory / "contexts.safetensors", thing=_THING)
        documents = tuple(DocumentId(**document) for document in content["documents"])
        counts = content.get("aligned") and AlignmentCounts.from_json(content["aligned"])
        loaded = cls(**tensors, documents=documents, vocabulary=content["vocabulary"], aligned=counts)
        if loaded.hash != content["hash"]:
            raise FileFormatError(
                f"the tokens in {directory} are not those the analysis set was saved with.",
                details=[f"expected  {content['hash']}", f"found     {loaded.hash}"],
                hint="Its two files are of different runs, or damaged: make the analysis set again.",
            )
        return loaded

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.roles, self.document, self.char_start, self.char_end, self.kept

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, int]]:
        """First and last token, and number, of every document by hash."""
        places: dict[str, tuple[int, int, int]] = {}
        tokens = (self.document >= 0).nonzero().squeeze(-1)
        numbers, order = self.document[tokens].sort(stable=True)
        unique, counts = numbers.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        for number, stop, count in zip(unique.tolist(), stops.tolist(), counts.tolist(), strict=True):
            of_document = tokens[order[stop - count : stop]]
            places[self.documents[number].hash] = int(of_document[0]), int(of_document[-1]), number
        return places


def _renumbered(context: Context, numbers: dict[DocumentId, int]) -> Tokens:
    """The context's tokens with their documents counted within the set."""
    table = np.array([*(numbers[document] for document in context.documents), -1], dtype=np.int32)
    old = context.tokens
    return Tokens(old.ids, old.roles, table[old.document], old.char_start, old.char_end, old.kept)
