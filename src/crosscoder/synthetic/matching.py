"""Which latent found which concept: cosines, the mean of the largest, and one-to-one matching.

With unit vectors `d̂_i` of latents and `ĉ_j` of concepts

    mean max cosine   MMCS = mean_j max_i ⟨d̂_i, ĉ_j⟩                   (Sharkey, Braun & Millidge 2022)
    matched cosine    MCC  = mean over pairs of the one-to-one matching π that maximises Σ_j ⟨d̂_π(j), ĉ_j⟩

Vectors are decoder rows in raw space, the space in which the world's directions are known, all sources side by side: a
latent is right when it is right everywhere, so that one that has half of a shared concept scores 0.71. (What a latent
that is called exclusive stands for is asked at its own source alone, in `recovery`.) Signs count, as values are
positive. MCC falls with the number of concepts that share a latent, which MMCS does not see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import NonFiniteActivations, SourceMismatch
from crosscoder.synthetic.truth import Truth


@dataclass(frozen=True)
class Matching:
    """Concepts and the latents that match them one to one.

    `latents[n]` is matched to `concepts[n]` with cosine `cosine[n]`; `best_cosine` is each concept's largest over all
    latents. `unique_fraction` is the fraction of concepts whose best latents differ.
    """

    concepts: Int[Tensor, "pairs"]
    latents: Int[Tensor, "pairs"]
    cosine: Float[Tensor, "pairs"]
    best_latent: Int[Tensor, "concepts"]
    best_cosine: Float[Tensor, "concepts"]

    @property
    def mean_max_cosine(self) -> float:
        """MMCS over all concepts."""
        return float(self.best_cosine.mean())

    @property
    def matched_cosine(self) -> float:
        """MCC: mean cosine over all concepts; one without a latent of its own counts 0."""
        return float(self.cosine.sum() / len(self.best_cosine))

    @property
    def unique_fraction(self) -> float:
        """Different best latents, as a fraction of the concepts."""
        return len(self.best_latent.unique()) / len(self.best_latent)

    def recovered(self, cosine: float = 0.83) -> float:
        """Fraction of concepts whose best cosine exceeds a cut; 0.83 is that of Jiralerspong & Bricken 2026."""
        return float((self.best_cosine > cosine).double().mean())

    def table(self) -> pa.Table:
        """One row per matched pair."""
        return pa.table(
            {
                "concept": pa.array(self.concepts.tolist(), pa.int32()),
                "latent": pa.array(self.latents.tolist(), pa.int32()),
                "cosine": pa.array(self.cosine.tolist(), pa.float32()),
                "best_latent": pa.array(self.best_latent[self.concepts].tolist(), pa.int32()),
                "best_cosine": pa.array(self.best_cosine[self.concepts].tolist(), pa.float32()),
            }
        )


@torch.no_grad()
def matching(crosscoder: Crosscoder, truth: Truth) -> Matching:
    """The matching of a trained crosscoder to what was planted at the sources that it writes."""
    return match(cosines(crosscoder, truth))


@torch.no_grad()
def cosines(crosscoder: Crosscoder, truth: Truth, *, source: str | None = None) -> Float[Tensor, "latents concepts"]:
    """Cosine of every decoder row with every concept: at all written sources side by side, or at one `source`.

    0 where a latent cannot write, or a concept does not live, at that source.
    """
    keys = crosscoder.writes.keys if source is None else (crosscoder.writes.resolve(source).key,)
    missing = [key for key in keys if key not in truth.sources]
    if missing:
        raise SourceMismatch(
            "the crosscoder writes sources of which the truth is not known.",
            details=missing,
            hint="Give the truth of the world that it was trained on.",
        )
    rows = torch.cat([crosscoder.decoder_rows(key, space="raw").cpu() for key in keys], dim=1)
    planted = torch.cat([truth.directions[key] for key in keys], dim=1)
    return _unit(rows) @ _unit(planted).T


def match(similarity: Float[Tensor, "latents concepts"]) -> Matching:
    """The matching by any similarity of latents and concepts."""
    best = similarity.max(dim=0)
    latents, concepts = assign(similarity.double().numpy())
    order = np.argsort(concepts)
    i, j = torch.from_numpy(latents[order]), torch.from_numpy(concepts[order])
    return Matching(j, i, similarity[i, j], best_latent=best.indices, best_cosine=best.values)


def assign(
    similarity: Float[np.ndarray, "rows columns"],
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """Rows and columns of the one-to-one matching with the largest total; all of the shorter side is matched.

    Shortest augmenting paths with dual prices (Jonker & Volgenant 1987; Crouse 2016), one path for each row of the
    shorter side, each in O(rows · columns). Raises NonFiniteActivations for similarities that are not numbers.
    """
    if not np.isfinite(similarity).all():
        raise NonFiniteActivations(
            "expected similarities that are numbers; some are NaN or infinite.",
            hint="A decoder that holds NaN comes of training that diverged.",
        )
    if similarity.shape[0] > similarity.shape[1]:
        columns, rows = assign(similarity.T)
        return rows, columns
    cost = similarity.max(initial=0.0) - similarity
    prices = _Prices(np.zeros(cost.shape[0]), np.zeros(cost.shape[1]))
    row_of = np.full(cost.shape[1], _FREE)
    for row in range(cost.shape[0]):
        _augment(cost, prices, row_of, row=row)
    columns = (row_of != _FREE).nonzero()[0]
    return row_of[columns], columns


_FREE = -1


@dataclass
class _Prices:
    """Dual variables: reduced cost `cost − of_row − of_column ≥ 0`, and 0 on matched pairs."""

    of_row: np.ndarray
    of_column: np.ndarray


def _augment(cost: np.ndarray, prices: _Prices, row_of: np.ndarray, *, row: int) -> None:
    """Match `row` along the shortest path of reduced costs to a free column; `row_of` is changed."""
    shortest = np.full(cost.shape[1], np.inf)
    before = np.full(cost.shape[1], row)  # the row from which each column was reached
    done = np.zeros(cost.shape[1], dtype=bool)
    here, length = row, 0.0
    while True:
        through = length + cost[here] - prices.of_row[here] - prices.of_column
        closer = ~done & (through < shortest)
        shortest[closer], before[closer] = through[closer], here
        column = int(np.where(done, np.inf, shortest).argmin())
        length = shortest[column]
        if row_of[column] == _FREE:
            break
        done[column] = True
        here = row_of[column]
    prices.of_row[row] += length
    prices.of_row[row_of[done]] += length - shortest[done]
    prices.of_column[done] -= length - shortest[done]
    _flip(row_of, before, column=column, row=row)


def _flip(row_of: np.ndarray, before: np.ndarray, *, column: int, row: int) -> None:
    """Give every column of the path the row that it was reached from."""
    while True:
        found = before[column]
        given = (row_of == found).nonzero()[0]
        row_of[column] = found
        if found == row:
            return
        column = int(given[0])


def _unit(rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Rows of length 1; zero rows stay zero."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
