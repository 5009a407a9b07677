"""Exact selection of active latents among candidates; no (rows x latents) matrix has to exist, no list is sorted whole.

    BatchTopK   the k·B largest positive scores of the batch
    TopK        in each row, the k largest positive scores
    threshold   every pre-activation above its own latent's threshold

A cut somewhat below the expected threshold gives the candidates. The largest of those are the answer if the lowest
score kept lies further above the cut than the proposing product errs (`candidates.py`); otherwise, or if candidates
are too few, the cut is lowered and they are found anew. Among equal scores at the threshold the lowest row wins, then
the lowest latent. So what is kept is what the definition keeps in full precision, whatever the cut was: a cut decides
how long it takes, and no more of the values than their last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.codes import SparseCode
from crosscoder.kernels import candidates, torch_ops
from crosscoder.kernels.candidates import BF16_ROUNDING, BLOCK_ELEMENTS, Candidates, Encoding
from crosscoder.kernels.cuts import Cut

SAMPLE_ROWS = 128
FEW_ROWS = 32
"""Enough to tell a code that is sparse from one that is not."""
OVERSHOOT = 1.3
"""How many times the candidates needed a sampled cut aims at."""
MOST_TRIES = 12
NEAR = 0.1
"""How far above the lowest candidate of a row, as a share of it, errors stand for those below."""
NO_LIMIT = 2**62
ROOM = 6
"""A cut that gives more candidates than so many times what is kept is of another time."""


@dataclass(frozen=True)
class _Found:
    """Candidates of all groups above a cut in scores."""

    parts: Sequence[Candidates]
    low: float

    @property
    def scores(self) -> Tensor:
        return torch.cat([part.scores for part in self.parts])

    @property
    def reach(self) -> float:
        """No score that is not among the candidates is higher."""
        return self.low + 2 * self.deviation

    @property
    def deviation(self) -> float:
        return max(part.deviation for part in self.parts)


class _Bracket:
    """The cut to try next, between one that gave too many candidates and one that gave too few."""

    def __init__(self, low: float) -> None:
        self.low = low
        self.too_many = 0.0
        self.widened = False
        self._too_few, self._first_too_few, self._sampled = torch.inf, 0.0, False

    def widen_to(self, low: float) -> None:
        """The last cut gave enough candidates, but lies too close to the threshold."""
        self.low, self.widened = max(low, self.too_many), True

    def raise_above(self, low: float, *, sampled: Callable[[], float]) -> None:
        """`low` gave too many."""
        self.too_many = max(low, self.too_many)
        self._next(sampled, otherwise=2 * low)

    def lower_below(self, low: float, *, sampled: Callable[[], float]) -> None:
        """`low` gave too few."""
        self._first_too_few = self._first_too_few or low
        self._too_few = min(low, self._too_few)
        self._next(sampled, otherwise=low / 2)

    def _next(self, sampled: Callable[[], float], *, otherwise: float) -> None:
        """What a sample says, if that is news; then the middle, or all that is positive."""
        low, self._sampled = (torch.nan if self._sampled else sampled()), True
        if self.too_many < low < self._too_few:
            self.low = low
        elif self.too_many == 0 and self._too_few < 0.1 * self._first_too_few:
            self.low = 0.0
        else:
            self.low = otherwise if self._too_few == torch.inf else (self.too_many + self._too_few) / 2


@dataclass(frozen=True)
class _FoundByRow:
    """Candidates of every row, by latent, and a score that no other pair of the row exceeds."""

    latents: Int[Tensor, "rows count"]
    values: Float[Tensor, "rows count"]
    scores: Float[Tensor, "rows count"]
    reach: Float[Tensor, "rows"]


def batch_top_k(encodings: Sequence[Encoding], k: int, cut: Cut) -> list[SparseCode]:
    """The k·rows largest positive scores of all groups together, as one code per group."""
    num_rows = encodings[0].x.shape[0]
    count = min(k * num_rows, num_rows * sum(e.num_latents for e in encodings))
    found, lowest = _enough(encodings, count, k, cut)
    cut.learn(lowest, deviation=found.deviation)
    kept = _largest(found, count=count, lowest=lowest, num_latents=sum(e.num_latents for e in encodings))
    return _codes(encodings, found.parts, kept)


def top_k(encodings: Sequence[Encoding], k: int, cut: Cut) -> list[SparseCode]:
    """The k largest positive scores of every row among all groups together, as one code per group.

    Candidates are somewhat more than k of every row's largest proposals; rows in which those are too close to call are
    done from all their scores. `cut` has no use here.
    """
    num_latents = sum(e.num_latents for e in encodings)
    k = min(k, num_latents)
    found = _proposed_by_row(encodings, min(num_latents, k + max(16, k // 4)))
    lowest = found.scores.topk(k, dim=1).values[:, -1]
    safe = lowest > found.reach if found.latents.shape[1] < num_latents else torch.ones_like(lowest, dtype=torch.bool)
    row, slot = (_row_maxima(found.scores, lowest, k) & safe[:, None]).nonzero(as_tuple=True)
    size = (len(lowest), num_latents)
    code = SparseCode.from_pairs(row, found.latents[row, slot], found.values[row, slot], size=size)
    short = (~safe).nonzero().squeeze(1)
    if short.shape[0]:
        code = _both(code, _row_by_row(encodings, short, k))
    return code.split([e.num_latents for e in encodings])


def above_threshold(encodings: Sequence[Encoding], thresholds: Sequence[Tensor], cut: Cut) -> list[SparseCode]:
    """Every pair whose score is above its latent's threshold, as one code per group."""
    while True:
        cuts = [_lowered(e, t, cut.slack) for e, t in zip(encodings, thresholds, strict=True)]
        parts = candidates.above(encodings, cuts, at_most=NO_LIMIT)
        assert parts is not None, "there is no limit"
        deviation = max(part.deviation for part in parts)
        if all(e.proposer is None for e in encodings) or cut.slack > 2 * deviation > 0:
            break
        if deviation == 0:  # nothing was proposed, so nothing says how far the product errs
            encodings = _in_full(encodings)
        cut.slack = 4 * deviation
    cut.slack = min(cut.slack, 4 * deviation) if deviation else cut.slack
    kept = [part.scores > t[part.latents] for part, t in zip(parts, thresholds, strict=True)]
    return _codes(encodings, parts, torch.cat(kept))


@torch.no_grad()
def share_above(encodings: Sequence[Encoding], thresholds: Sequence[Tensor]) -> float:
    """About which share of all pairs scores above its latent's threshold, from a sample of rows."""
    scores = _sampled_scores(encodings, num_rows=FEW_ROWS)
    return float((scores > torch.cat(list(thresholds))).float().mean()) if scores.numel() else 0.0


def _enough(encodings: Sequence[Encoding], count: int, k: int, cut: Cut) -> tuple[_Found, float]:
    """Candidates among which the `count` largest positive scores surely are, and the lowest of those."""
    bracket = _Bracket(cut.guess if cut.guess > 0 else _sampled_cut(encodings, OVERSHOOT * k))
    for _ in range(MOST_TRIES):
        low = bracket.low
        if low <= 0:
            break
        found = _above(encodings, low, at_most=ROOM * count)
        lowest = _kth(found, count)
        if found is None:
            bracket.raise_above(low, sampled=lambda: _sampled_cut(encodings, k))
        elif lowest > found.reach:
            return found, lowest
        elif lowest > 0 and not bracket.widened:
            bracket.widen_to(lowest - 4 * found.deviation)
        elif lowest > 0:
            return _in_full_above(encodings, low, count)
        else:
            bracket.lower_below(low, sampled=lambda: _sampled_cut(encodings, OVERSHOOT * k))
    return _in_full_above(encodings, bracket.too_many, count)


def _in_full_above(encodings: Sequence[Encoding], low: float, count: int) -> tuple[_Found, float]:
    """The same from a product in full precision, with as many candidates as it takes; `low` must give enough."""
    found = _above(_in_full(encodings), low, at_most=NO_LIMIT)
    assert found is not None, "there is no limit"
    lowest = _kth(found, count)
    return (found, lowest) if lowest > 0 or low == 0 else _in_full_above(encodings, 0.0, count)


def _kth(found: _Found | None, count: int) -> float:
    """The count-th largest score of the candidates, 0 where there are fewer."""
    if found is None or (scores := found.scores).shape[0] < count or not count:
        return 0.0
    return float(scores.kthvalue(scores.shape[0] - count + 1).values)


def _above(encodings: Sequence[Encoding], low: float, *, at_most: int) -> _Found | None:
    cuts = [torch.where(e.gate > 0, low / e.gate, torch.inf) for e in encodings]
    parts = candidates.above(encodings, cuts, at_most=at_most)
    return None if parts is None else _Found(parts, low)


def _in_full(encodings: Sequence[Encoding]) -> list[Encoding]:
    return [replace(e, proposer=None) for e in encodings]


def _lowered(encoding: Encoding, threshold: Tensor, slack: float) -> Tensor:
    """A cut on pre-activations that surely lies below the threshold on scores."""
    rounding = 4 * torch.finfo(threshold.dtype).eps * threshold.abs()
    low = threshold - rounding - (slack if encoding.proposer is not None else 0.0)
    return torch.where(encoding.gate > 0, low / encoding.gate, torch.inf)


def _sampled_cut(encodings: Sequence[Encoding], per_row: float) -> float:
    """A score that about `per_row` pairs per row exceed; 0 when fewer are positive."""
    sample = _sampled_scores(encodings)
    wanted = int(per_row * len(sample)) + 1
    if wanted >= sample.numel():
        return 0.0
    return max(0.0, float(sample.flatten().topk(wanted, sorted=False).values.min()))


def _sampled_scores(encodings: Sequence[Encoding], *, num_rows: int = SAMPLE_ROWS) -> Float[Tensor, "sample latents"]:
    every = max(1, encodings[0].x.shape[0] // num_rows)
    rows = torch.arange(0, encodings[0].x.shape[0], every, device=encodings[0].x.device)
    return torch.cat([e.scores(rows) for e in encodings], dim=1)


def _largest(found: _Found, *, count: int, lowest: float, num_latents: int) -> Bool[Tensor, "found"]:
    """Which candidates are the `count` largest positive ones, the last of which has the score `lowest`."""
    scores = found.scores
    kept = scores > lowest
    missing = count - int(kept.sum()) if lowest > 0 else 0
    if missing:
        ties = (scores == lowest).nonzero().squeeze(1)
        places = _places(found, num_latents)[ties]
        kept[ties[places.topk(min(missing, len(ties)), largest=False).indices]] = True
    return kept


def _places(found: _Found, num_latents: int) -> Tensor:
    """The place of every candidate in a full matrix, read row by row."""
    return torch.cat([part.rows for part in found.parts]) * num_latents + _global_latents(found)


def _global_latents(found: _Found) -> Tensor:
    firsts = [0]
    for part in found.parts:
        firsts.append(firsts[-1] + part.num_latents)
    return torch.cat([part.latents + first for part, first in zip(found.parts, firsts, strict=False)])


def _row_maxima(scores: Float[Tensor, "rows some"], lowest: Tensor, k: int) -> Bool[Tensor, "rows some"]:
    """The k largest positive entries of every row, of which `lowest` is the last; of equal ones the first."""
    above, equal = scores > lowest[:, None], scores == lowest[:, None]
    room = k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))) & (scores > 0)


def _proposed_by_row(encodings: Sequence[Encoding], count: int) -> _FoundByRow:
    """The `count` largest proposals of every row, by latent, with their exact values."""
    num_rows = encodings[0].x.shape[0]
    height = max(1, BLOCK_ELEMENTS // sum(e.num_latents for e in encodings))
    blocks = [_block_of_rows(encodings, slice(r, r + height), count) for r in range(0, max(1, num_rows), height)]
    latents, values, approximate = (torch.cat(column) for column in zip(*blocks, strict=True))
    if any(e.proposer is not None for e in encodings):
        values = _exact_values(encodings, latents)
    scores = values * torch.cat([e.gate for e in encodings])[latents]
    reach = approximate.amin(1) if approximate.numel() else approximate.new_zeros(num_rows)
    if any(e.proposer is not None for e in encodings):
        error = (approximate - scores).abs() - 2 * BF16_ROUNDING * approximate.abs()
        near = approximate <= (reach + NEAR * reach.abs())[:, None]
        deviation = torch.where(near, error, 0.0).max().clamp(min=0) if error.numel() else 0.0
        reach = reach + 2 * BF16_ROUNDING * reach.abs() + 2 * deviation
    return _FoundByRow(latents, values, scores, reach)


def _block_of_rows(encodings: Sequence[Encoding], rows: slice, count: int) -> tuple[Tensor, Tensor, Tensor]:
    pre = [e.proposed(rows) for e in encodings]
    scores = torch.cat([p * e.gate.to(p.dtype) for p, e in zip(pre, encodings, strict=True)], dim=1)
    latents = scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    return latents, torch.cat(pre, dim=1).gather(1, latents), scores.gather(1, latents).to(encodings[0].x.dtype)


def _exact_values(encodings: Sequence[Encoding], latents: Tensor) -> Float[Tensor, "rows count"]:
    """Pre-activations of some latents of every row, in full precision."""
    rows = torch.arange(len(latents), device=latents.device).repeat_interleave(latents.shape[1])
    sizes = [e.num_latents for e in encodings]
    places = torch.arange(latents.numel(), device=latents.device, dtype=torch.float64)  # carried along as values
    pairs = SparseCode.from_pairs(rows, latents.flatten(), places, size=(len(latents), sum(sizes)))
    found = torch.empty(latents.numel(), dtype=encodings[0].x.dtype, device=latents.device)
    for encoding, own in zip(encodings, pairs.split(sizes), strict=True):
        products = torch_ops.pair_products(own.pattern, encoding.x, encoding.encoder)
        found[own.values.long()] = products + encoding.bias[own.latents]
    return found.view_as(latents)


def _row_by_row(encodings: Sequence[Encoding], rows: Tensor, k: int) -> SparseCode:
    """TopK of some rows, the others empty, from all their scores."""
    pairs: list[tuple[Tensor, ...]] = []
    for some in rows.split(SAMPLE_ROWS):
        pre = torch.cat([torch.addmm(e.bias, e.x[some], e.encoder.T) for e in encodings], dim=1)
        scores = pre * torch.cat([e.gate for e in encodings])
        row, latent = _row_maxima(scores, scores.topk(k, dim=1).values[:, -1], k).nonzero(as_tuple=True)
        pairs.append((some[row], latent, pre[row, latent]))
    row, latent, values = (torch.cat(column) for column in zip(*pairs, strict=True))
    size = (encodings[0].x.shape[0], sum(e.num_latents for e in encodings))
    return SparseCode.from_pairs(row, latent, values, size=size)


def _both(a: SparseCode, b: SparseCode) -> SparseCode:
    """The pairs of two codes of different rows."""
    rows, latents = torch.cat([a.row_ids, b.row_ids]), torch.cat([a.latents, b.latents])
    order = rows.argsort(stable=True)
    values = torch.cat([a.values, b.values])[order]
    return SparseCode.from_pairs(rows[order], latents[order], values, size=(a.num_rows, a.num_latents))


def _codes(encodings: Sequence[Encoding], parts: Sequence[Candidates], kept: Tensor) -> list[SparseCode]:
    """The kept candidates as one code per group."""
    codes: list[SparseCode] = []
    own = kept.split([part.rows.shape[0] for part in parts])
    for encoding, part, mask in zip(encodings, parts, own, strict=True):
        pairs = mask.nonzero().squeeze(1)
        rows, latents, values = part.rows[pairs], part.latents[pairs], part.values[pairs]
        size = (encoding.x.shape[0], encoding.num_latents)
        codes.append(SparseCode.from_latent_order(rows, latents, values, size=size))
    return codes
