"""Sums per latent under many resamplings of the documents, in one pass: the Poisson bootstrap.

    T_i = Σ_p t_p                      the sums as they are, p over the active pairs of latent i
    T_i^r = Σ_p w_{D(p), r} t_p        under draw r, w_{D, r} ~ Poisson(1) independent, D(p) the document of the pair

A document with a Poisson(1) weight is one drawn with replacement from a large corpus (Chamandy et al. 2012, "Estimating
uncertainty for massive data streams"). Tokens of one document are not independent, so that documents are resampled and
not rows. The weights of a document are a pure function of (seed, document): batches do not matter, and a document may
begin in one batch and end in the next. Memory is (sums x latents x draws), whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import Batch
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.codes import SparseCode
from crosscoder.errors import ConfigError, TextError

MIN_DOCUMENTS = 5
"""A latent that is active in fewer documents has no interval: resampling so few says nothing of the others."""
_POISSON = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(20)])
_CELLS = 2**22
"""Sums by latent and document that are held at once."""


@dataclass(frozen=True)
class Bootstrap:
    """How documents are resampled: how often, from which seed, and which rows are of one document.

    `text` says so; without it every context counts as a document. `level` is the share of draws between the ends of an
    interval.
    """

    num_draws: int = 100
    seed: int = 0
    level: float = 0.95
    text: AnalysisSet | None = None

    def __post_init__(self) -> None:
        if self.num_draws < 2 or not 0 < self.level < 1:
            raise ConfigError(
                "expected at least 2 draws and a level between 0 and 1.",
                details=[f"num_draws  {self.num_draws}", f"level      {self.level}"],
                hint="Give no bootstrap (None) to do without intervals.",
            )

    def documents(self, batch: Batch) -> Int[Tensor, "rows"]:
        """The number of each row's document; tokens that are of none count with their context.

        Raises TextError where rows do not say where they lie, or lie beyond the text.
        """
        if batch.rows is None:
            raise TextError(
                "intervals resample documents, and these rows do not say which context they are of.",
                hint="Give activations whose batches carry rows, or bootstrap=None.",
            )
        context, text = batch.rows.context.long().cpu(), self.text
        if text is None:
            return context
        place = text.pointers[context.clamp(max=text.num_contexts - 1)] + batch.rows.position.long().cpu()
        if len(context) and (int(context.max()) >= text.num_contexts or int(place.max()) >= text.num_tokens):
            raise TextError(
                f"a row lies in context {int(context.max())}; the text has {text.num_contexts} contexts.",
                hint="Give the analysis set that these activations are of.",
            )
        document = text.document[place].long()
        return torch.where(document < 0, len(text.documents) + context, document)

    def weights(self, documents: Int[Tensor, "documents"]) -> Float[Tensor, "documents draws"]:
        """Poisson(1) counts of each document in every draw, in fp64."""
        drawn = [self._uniform(document) for document in documents.tolist()]
        counts = np.searchsorted(_POISSON, np.stack(drawn), side="right") if drawn else np.zeros((0, self.num_draws))
        return torch.from_numpy(counts.astype(np.float64))

    def _uniform(self, document: int) -> Float[np.ndarray, "draws"]:
        key = np.array([self.seed % 2**64, document % 2**64], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(self.num_draws)


@dataclass(frozen=True)
class _Stretch:
    """Some documents of a batch: their numbers, and for the pairs in them, which pairs and which document."""

    documents: Int[Tensor, "documents"]
    pairs: Tensor | slice
    columns: Int[Tensor, "active"]


class LatentSums:
    """Running fp64 sums of some terms over every latent's active pairs; also under each draw of a bootstrap."""

    def __init__(
        self, num_sums: int, num_latents: int, *, bootstrap: Bootstrap | None, device: torch.device | str = "cpu"
    ) -> None:
        self.bootstrap = bootstrap
        self._size = (num_sums, num_latents)
        draws = 0 if bootstrap is None else bootstrap.num_draws
        self._totals = torch.zeros(num_sums * num_latents, 1 + draws, dtype=torch.float64, device=device)
        self._last_document = torch.full((num_latents,), -1, device=device)
        self.num_active = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.num_documents = torch.zeros(num_latents, dtype=torch.int64, device=device)
        """In how many documents each latent is active, when documents come one after the other; 0 without bootstrap."""

    @property
    def totals(self) -> Float[Tensor, "sums latents one_and_draws"]:
        """The sums: as they are (column 0), then under every draw."""
        return self._totals.view(*self._size, -1)

    @property
    def num_bytes(self) -> int:
        """The memory that the sums take, which no number of rows changes."""
        held = (self._totals, self._last_document, self.num_active, self.num_documents)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def add(self, batch: Batch, code: SparseCode, terms: Sequence[Float[Tensor, "active"]]) -> None:
        """Add one value of every sum for each active pair of the batch."""
        self.num_active += torch.bincount(code.latents, minlength=self._size[1])
        for stretch in self._stretches(batch, code):
            by_document = self._by_document(stretch, code, terms)
            weights = self._weights(stretch.documents).to(self._totals.device)
            self._totals.addmm_(by_document.view(-1, len(stretch.documents)), weights)

    def _by_document(self, stretch: _Stretch, code: SparseCode, terms: Sequence[Tensor]) -> Tensor:
        num_documents = len(stretch.documents)
        cells = code.latents[stretch.pairs] * num_documents + stretch.columns
        found = self._totals.new_zeros(self._size[0], self._size[1] * num_documents)
        for row, term in zip(found, terms, strict=True):
            row.index_add_(0, cells, term[stretch.pairs].to(torch.float64))
        if self.bootstrap is not None:
            self._count_documents(cells, stretch.documents)
        return found

    def _count_documents(self, cells: Tensor, documents: Tensor) -> None:
        """Count the documents in which each latent is active; one that was counted in the batch before is not new."""
        num_latents, documents = self._size[1], documents.to(cells.device)
        active = torch.zeros(num_latents * len(documents), dtype=torch.bool, device=cells.device)
        active[cells] = True
        active = active.view(num_latents, -1)
        again = (active & (documents == self._last_document[:, None])).any(1)
        self.num_documents += active.sum(1) - again.long()
        latest = torch.where(active, documents, -1).amax(1)
        self._last_document = torch.maximum(self._last_document, latest)

    def _stretches(self, batch: Batch, code: SparseCode) -> Iterator[_Stretch]:
        """The batch cut into so many documents that their sums fit into memory; all of it where none are told apart."""
        if not code.num_active:
            return
        rows = code.row_ids
        if self.bootstrap is None:
            yield _Stretch(rows.new_zeros(1), slice(None), torch.zeros_like(rows))
            return
        documents, column = self.bootstrap.documents(batch).unique(return_inverse=True)
        columns = column.to(rows.device)[rows]
        step = max(32, _CELLS // (self._size[0] * self._size[1]))
        if len(documents) <= step:
            yield _Stretch(documents, slice(None), columns)
            return
        for first in range(0, len(documents), step):
            pairs = ((columns >= first) & (columns < first + step)).nonzero().squeeze(1)
            yield _Stretch(documents[first : first + step], pairs, columns[pairs] - first)

    def _weights(self, documents: Tensor) -> Float[Tensor, "documents one_and_draws"]:
        ones = torch.ones(len(documents), 1, dtype=torch.float64)
        return ones if self.bootstrap is None else torch.cat([ones, self.bootstrap.weights(documents)], dim=1)
