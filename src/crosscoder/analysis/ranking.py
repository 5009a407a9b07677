"""How well a score separates two sets of rows: AUROC by ranks, for all latents of a sparse code at once.

    AUROC = P(score⁺ > score⁻) + ½ P(score⁺ = score⁻) = Σ_strata U / Σ_strata n⁺ n⁻

Pairs are formed within a stratum only (rows of one role), so that no difference between roles can count. For a sparse
code the inactive rows of a latent are one tie at zero, below every active one; only active entries are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from crosscoder.codes import SparseCode


@dataclass(frozen=True)
class Truth:
    """What a score has to tell: `positive` per row, and the stratum within which rows are compared."""

    positive: Bool[np.ndarray, "rows"]
    stratum: Int[np.ndarray, "rows"]

    @property
    def num_pairs(self) -> int:
        """Pairs of a positive and a negative row of one stratum."""
        return sum(int(self.positive[s].sum()) * int((~self.positive[s]).sum()) for s in self.strata)

    @property
    def strata(self) -> list[Bool[np.ndarray, "rows"]]:
        """The rows of every stratum."""
        return [self.stratum == value for value in np.unique(self.stratum)]

    def of(self, rows: Bool[np.ndarray, "rows"]) -> Truth:
        """The part on some rows."""
        return Truth(self.positive[rows], self.stratum[rows])


def auroc(
    score: Float[np.ndarray, "rows"], truth: Truth, weight: Float[np.ndarray, "draws rows"] | None = None
) -> Float[np.ndarray, "draws"]:
    """The AUROC of one score, once for every draw of row weights (one draw of ones by default); NaN without pairs."""
    weight = np.ones((1, len(score))) if weight is None else weight
    wins, pairs = np.zeros(len(weight)), np.zeros(len(weight))
    for rows in truth.strata:
        positive, drawn = truth.positive[rows], weight[:, rows]
        wins += _weighted_wins(score[rows], positive, drawn)
        pairs += drawn[:, positive].sum(1) * drawn[:, ~positive].sum(1)
    return np.divide(wins, pairs, out=np.full(len(weight), np.nan), where=pairs > 0)


def auroc_of_latents(code: SparseCode, truth: Truth) -> Float[np.ndarray, "latents"]:
    """The AUROC of every latent's value; NaN without pairs."""
    if truth.num_pairs == 0:
        return np.full(code.num_latents, np.nan)
    row_ids, latents = code.row_ids.cpu().numpy(), code.latents.cpu().numpy()
    values = code.values.detach().double().cpu().numpy()
    wins = np.zeros(code.num_latents)
    for rows in truth.strata:
        here = rows[row_ids]
        wins += _sparse_wins(
            latents[here],
            values[here],
            truth.positive[row_ids[here]],
            totals=(int(truth.positive[rows].sum()), int((~truth.positive[rows]).sum())),
            num_latents=code.num_latents,
        )
    return wins / truth.num_pairs


def best_threshold(score: Float[np.ndarray, "rows"], positive: Bool[np.ndarray, "rows"]) -> float:
    """The cut `score >= cut` with the largest F1 (the highest such), halfway down to the next lower score."""
    order = np.argsort(-score, kind="stable")
    ordered, hits = score[order], np.cumsum(positive[order])
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + positive.sum())
    last_of_tie = np.append(ordered[1:] != ordered[:-1], True)
    best = int(np.argmax(np.where(last_of_tie, f1, -1.0)))
    return float(ordered[best : best + 2].mean())


def f1_score(score: Float[np.ndarray, "rows"], positive: Bool[np.ndarray, "rows"], *, threshold: float) -> float:
    """`2 TP / (2 TP + FP + FN)` of the cut `score >= threshold`."""
    called = score >= threshold
    hits = int((called & positive).sum())
    return 2 * hits / max(1, int(called.sum()) + int(positive.sum()))


def bootstrap_auroc(
    score: Float[np.ndarray, "rows"],
    truth: Truth,
    documents: Int[np.ndarray, "rows"],
    *,
    num_draws: int,
    seed: int = 0,
) -> Float[np.ndarray, "draws"]:
    """The AUROC in every draw of documents with replacement; NaN in draws without pairs."""
    at_once = max(1, 4_000_000 // max(1, len(score)))
    draws = document_draws(documents, num_draws=num_draws, seed=seed, at_once=at_once)
    return np.concatenate([auroc(score, truth, weight) for weight in draws])


def document_draws(
    documents: Int[np.ndarray, "rows"], *, num_draws: int, seed: int, at_once: int = 64
) -> Iterator[Float[np.ndarray, "some rows"]]:
    """Row weights of a bootstrap over documents (how often each row's document was drawn), some draws at a time."""
    _, index = np.unique(documents, return_inverse=True)
    count = int(index.max(initial=0)) + 1
    generator = np.random.Generator(np.random.Philox(seed))
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=num_draws)
    for first in range(0, num_draws, at_once):
        yield drawn[first : first + at_once, index].astype(np.float64)


def _weighted_wins(
    score: Float[np.ndarray, "rows"], positive: Bool[np.ndarray, "rows"], weight: Float[np.ndarray, "draws rows"]
) -> Float[np.ndarray, "draws"]:
    """`Σ w⁺ (w⁻ below + ½ w⁻ tied)` for every draw."""
    order = np.argsort(score, kind="stable")
    ordered, drawn = score[order], weight[:, order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    plus = np.add.reduceat(drawn * positive[order], starts, axis=1)
    minus = np.add.reduceat(drawn * ~positive[order], starts, axis=1)
    return (plus * (np.cumsum(minus, axis=1) - minus / 2)).sum(1)


def _sparse_wins(
    latents: Int[np.ndarray, "active"],
    values: Float[np.ndarray, "active"],
    positive: Bool[np.ndarray, "active"],
    *,
    totals: tuple[int, int],
    num_latents: int,
) -> Float[np.ndarray, "latents"]:
    """`U` of every latent: ties of active values by groups of (latent, value), the inactive rows as one tie at zero."""
    active_plus = np.bincount(latents[positive], minlength=num_latents)
    active_minus = np.bincount(latents[~positive], minlength=num_latents)
    zero_plus, zero_minus = totals[0] - active_plus, totals[1] - active_minus
    wins = zero_minus * (active_plus + zero_plus / 2)
    if len(latents) == 0:
        return wins
    order = np.lexsort((values, latents))
    i, v, plus = latents[order], values[order], positive[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, (i[1:] != i[:-1]) | (v[1:] != v[:-1])))
    plus, minus, of_group = np.add.reduceat(plus, starts), np.add.reduceat(1 - plus, starts), i[starts]
    before_latent = np.cumsum(active_minus) - active_minus
    below = np.cumsum(minus) - minus - before_latent[of_group]
    np.add.at(wins, of_group, plus * (below + minus / 2))
    return wins
