"""How many latents a behaviour rests on: its rate against the number suppressed, and the smallest set that suffices.

    curve          the first 1, 2, 4, 8, ... of ranked latents are suppressed together
    smallest set   from the first point of the curve whose rate is at most the target, latents are taken out again one
                   by one, the last-ranked first; each stays out if the rate stays at or below the target without it
    random sets    of every random order of latents the first n are suppressed, n such that KL(clean ‖ edited) on
                   unrelated text is nearest to that of the set under test: damage of the same size elsewhere. A set
                   whose KL is further off than a tolerance is no control; it says so (`within`)

A behaviour whose untouched rate is at or below the target is `not there`: nothing could be said of its latents.

The pruned set is minimal (no single latent can be spared, in the order tried), not the smallest of all sets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from crosscoder.errors import UnknownLatent
from crosscoder.interventions.behaviour import Rate
from crosscoder.interventions.edits import Edit, ablate
from crosscoder.interventions.side_effects import SideEffects, UnrelatedText, side_effects
from crosscoder.interventions.steering import Trial
from crosscoder.progress import Progress, silent

_log = logging.getLogger(__name__)

Suppress = Callable[[Sequence[int]], Edit]
"""The edit that suppresses some latents: `ablate`, or one that acts on some tokens or in one model only."""

FEW, DOZENS = 10, 100
"""Up to so many latents the answer is `few`, and `dozens`; beyond, the behaviour is `spread`."""


@dataclass(frozen=True)
class SuppressedSet:
    """Latents that are suppressed together, the rate that remains, and the side effects."""

    latents: tuple[int, ...]
    rate: Rate
    side_effects: SideEffects


@dataclass(frozen=True)
class MatchedSet(SuppressedSet):
    """Random latents that were to do as much to unrelated text as others: the KL that was wanted, beside that reached.

    Outside the tolerance (`within` False) it did less damage, or more, and is to be left out of comparisons.
    """

    wanted_kl: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the KL reached is that wanted, up to `tolerance` times it."""
        return abs(self.side_effects.kl - self.wanted_kl) <= self.tolerance * self.wanted_kl


@dataclass(frozen=True)
class SuppressionCurve:
    """The rate with nothing suppressed, and against the number of latents."""

    untouched: Rate
    points: tuple[SuppressedSet, ...]

    def first_below(self, target: float) -> SuppressedSet | None:
        """The point with the fewest latents whose rate is at most `target`; None where none is."""
        return next((point for point in self.points if point.rate.share <= target), None)

    def table(self) -> pa.Table:
        """One row per number of latents."""
        return pa.Table.from_pylist([_row(point) for point in self.points])

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


@dataclass(frozen=True)
class SmallestSet:
    """A set that suffices for the target and of which no latent can be spared; `suppressed` is None where none does.

    `untouched` is the rate with nothing suppressed.
    """

    target: float
    untouched: float
    suppressed: SuppressedSet | None
    num_tried: int

    @property
    def answer(self) -> str:
        """`few`, `dozens`, `spread`, `not reached` by any number that was tried, or `not there` before any was."""
        if self.untouched <= self.target:
            return "not there"
        return "not reached" if self.suppressed is None else answer(len(self.suppressed.latents))


def answer(num_latents: int) -> str:
    """What a number of latents is called: `few`, `dozens` or `spread`."""
    return "few" if num_latents <= FEW else "dozens" if num_latents <= DOZENS else "spread"


def suppression_curve(
    trial: Trial,
    ranked: Sequence[int],
    unrelated: UnrelatedText,
    *,
    counts: Sequence[int] | None = None,
    suppress: Suppress = ablate,
    progress: Progress = silent,
) -> SuppressionCurve:
    """The rate against the number of `ranked` latents (best first) suppressed; by default 1, 2, 4, ... and all."""
    if not ranked:
        raise UnknownLatent("expected ranked latents to suppress; got none.")
    sizes = _doubling(len(ranked)) if counts is None else sorted({min(count, len(ranked)) for count in counts})
    points: list[SuppressedSet] = []
    for done, size in enumerate(sizes):
        progress("suppressing latents", done, len(sizes))
        points.append(suppressed(trial, ranked[:size], unrelated, suppress=suppress))
    progress("suppressing latents", len(sizes), len(sizes))
    return SuppressionCurve(trial.rate([]), tuple(points))


def suppressed(
    trial: Trial, latents: Sequence[int], unrelated: UnrelatedText, *, suppress: Suppress = ablate
) -> SuppressedSet:
    """What remains of the behaviour without some latents, and what else that does."""
    edit = suppress(latents)
    return SuppressedSet(tuple(latents), trial.rate([edit]), side_effects(trial.subject, unrelated, [edit]))


def smallest_set(
    trial: Trial,
    curve: SuppressionCurve,
    unrelated: UnrelatedText,
    *,
    target: float,
    suppress: Suppress = ablate,
    progress: Progress = silent,
) -> SmallestSet:
    """The first set on the curve whose rate is at most `target`, pruned; none where the untouched rate is."""
    untouched = curve.untouched.share
    start = None if untouched <= target else curve.first_below(target)
    if start is None:
        return SmallestSet(target, untouched, None, 0)
    kept = list(start.latents)
    for done, latent in enumerate(reversed(start.latents)):
        progress("pruning the set", done, len(start.latents))
        rest = [other for other in kept if other != latent]
        if rest and trial.rate([suppress(rest)]).share <= target:
            kept = rest
    progress("pruning the set", len(start.latents), len(start.latents))
    return SmallestSet(target, untouched, suppressed(trial, kept, unrelated, suppress=suppress), len(start.latents))


def matched_sets(
    trial: Trial,
    orders: Sequence[Sequence[int]],
    unrelated: UnrelatedText,
    *,
    kl: float,
    tolerance: float = 0.25,
    suppress: Suppress = ablate,
    progress: Progress = silent,
) -> list[MatchedSet]:
    """Of every order the first latents whose suppression does about `kl` to unrelated text, and what they leave.

    Sets further than `tolerance · kl` from it come too, with `within` False, and a warning is logged.
    """
    found: list[MatchedSet] = []
    for done, order in enumerate(orders):
        progress("matching random sets", done, len(orders))
        size = _matching(lambda n, order=order: _kl(trial, order[:n], unrelated, suppress), len(order), kl)
        done_by = suppressed(trial, order[:size], unrelated, suppress=suppress)
        found.append(MatchedSet(**vars(done_by), wanted_kl=kl, tolerance=tolerance))
    progress("matching random sets", len(orders), len(orders))
    outside = [f"{one.side_effects.kl:.3g}" for one in found if not one.within]
    if outside:
        _log.warning(
            "%d of %d random sets do not match a KL of %.3g within %.0f %%, but reach %s: they are no controls.",
            len(outside), len(found), kl, 100 * tolerance, ", ".join(outside),
        )  # fmt: skip
    return found


def _kl(trial: Trial, latents: Sequence[int], unrelated: UnrelatedText, suppress: Suppress) -> float:
    return side_effects(trial.subject, unrelated, [suppress(latents)]).kl


def _matching(measure: Callable[[int], float], longest: int, wanted: float) -> int:
    """The number up to `longest` whose measure is nearest to `wanted`, as far as doubling and halving find it."""
    tried = {1: measure(1)}
    while tried[max(tried)] < wanted and max(tried) < longest:
        size = min(longest, 2 * max(tried))
        tried[size] = measure(size)
    high = max(tried)
    low = max((size for size in tried if tried[size] < wanted), default=high)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = measure(middle)
        low, high = (middle, high) if tried[middle] < wanted else (low, middle)
    return min(tried, key=lambda size: abs(tried[size] - wanted))


def _doubling(longest: int) -> list[int]:
    sizes = [2**power for power in range(longest.bit_length()) if 2**power < longest]
    return [*sizes, longest]


def _row(point: SuppressedSet) -> dict[str, Any]:
    rate, aside = point.rate, point.side_effects
    return {
        "num_latents": len(point.latents),
        "hits": rate.hits,
        "total": rate.total,
        "rate": rate.share,
        "rate_low": rate.low,
        "rate_high": rate.high,
        "ce_clean": aside.clean,
        "ce_edited": aside.edited,
        "kl": aside.kl,
    }
