"""What the literature says of dictionaries across layers, registered before the runs, and the rule that decides.

Lindsey et al. 2024, section 1.4, on all residual layers of an 18-layer model: at equal loss the acausal crosscoder
needs about 8 times fewer latents than per-layer SAEs, and about twice the FLOPs; at equal FLOPs its total L0 is 15 to
40 times lower, with a better error; weakly causal latents lie between the two in latents and in FLOPs.

Two curves of the same seed are compared *at equal loss*: log size (latents, or training FLOPs per row) is interpolated
linearly against held-out loss between the sizes that were trained, at nine levels in the range that both curves cover,
and the mean difference of logs gives one ratio. Where the curves share no range there is no ratio. *At equal FLOPs* an
acausal crosscoder of F latents stands beside per-layer SAEs of F latents each. Over the seeds, with the mean m of log
ratios (of differences for shares of variance), their standard deviation s and Student's t for n − 1 degrees of freedom:

    confirmed       the whole interval m ± t₀.₉₇₅ s/√n lies beyond the effect
    refuted         the whole interval lies short of the effect
    inconclusive    the interval holds the effect, or fewer than three seeds give a number

Effects are for six layers, where no ratio of latents can exceed six: a latent written at all six layers replaces six.
As all train on the same rows, FLOPs follow from latents: per latent 10 · 6d for the acausal crosscoder, 10 · d for an
SAE, so that their ratio of FLOPs is 6 over their ratio of latents, and (published: 18 / 8) the two claims are one.
Effects come from the literature. Coefficient, k and learning rate come from a pilot on other rows, at one size of each
wiring (two of the acausal one), whose losses were seen before the runs that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log, nan
from statistics import mean
from typing import Any, Literal

import numpy as np
from verdicts import FEWEST, interval

LEVELS = 9

Cell = Mapping[str, Any]
Cells = Sequence[Cell]
Size = Literal["num_latents", "flops_per_row"]


@dataclass(frozen=True)
class EqualLoss:
    """How many times more of `size` the wiring `more` takes than `less` at equal held-out loss under L1."""

    size: Size
    more: str
    less: str

    def value(self, cells: Cells, seed: int) -> float:
        """The mean log ratio of one seed; NaN where the curves do not overlap."""
        ratios = self.along(cells, seed)
        return nan if ratios is None else float(ratios.mean())

    def along(self, cells: Cells, seed: int) -> np.ndarray | None:
        """The log ratio at every level of loss, lowest loss first; None where the curves do not overlap."""
        more, less = (curve(cells, wiring, self.size, seed=seed) for wiring in (self.more, self.less))
        levels = common_levels(more, less)
        return None if levels is None else at_loss(more, levels) - at_loss(less, levels)


@dataclass(frozen=True)
class EqualFlops:
    """How many times larger `field` is in per-layer SAEs than in the acausal crosscoder of the same FLOPs, under L1."""

    field: str

    def value(self, cells: Cells, seed: int) -> float:
        """The mean log ratio over the sizes that both have."""
        by_size = {
            w: {c["size"]: c[self.field] for c in cells if _is(c, "l1", w, seed)} for w in ("per-layer", "acausal")
        }
        shared = by_size["per-layer"].keys() & by_size["acausal"].keys()
        return mean(log(by_size["per-layer"][s] / by_size["acausal"][s]) for s in shared) if shared else nan


@dataclass(frozen=True)
class MoreVariance:
    """By how much the FVE of one BatchTopK dictionary exceeds another's, mean over pairs of sizes; same k per row."""

    better: str
    worse: str
    sizes: tuple[tuple[int, int], ...]

    def value(self, cells: Cells, seed: int) -> float:
        """The mean difference over the pairs that were trained."""
        fve = {(c["wiring"], c["size"]): c["fve"] for c in cells if c["sparsity"] == "batchtopk" and c["seed"] == seed}
        pairs = [(fve.get((self.better, a)), fve.get((self.worse, b))) for a, b in self.sizes]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        return mean(found) if found else nan


@dataclass(frozen=True)
class Finding:
    """One claim: which number, beyond which effect (a ratio, or a difference of FVE), and what was published."""

    claim: str
    measure: EqualLoss | EqualFlops | MoreVariance
    effect: float
    published: str


FINDINGS = (
    Finding(
        "At equal loss per-layer SAEs need more latents in total than the acausal crosscoder",
        EqualLoss("num_latents", "per-layer", "acausal"),
        2.0,
        "8 of 18 layers, which is 2.7 of 6",
    ),
    Finding(
        "At equal loss the acausal crosscoder needs more FLOPs than per-layer SAEs",
        EqualLoss("flops_per_row", "acausal", "per-layer"),
        1.25,
        "about 2",
    ),
    Finding(
        "At equal loss per-layer SAEs need more latents than the weakly causal crosscoder",
        EqualLoss("num_latents", "per-layer", "weakly-causal"),
        1.25,
        "about 2 to 3 of 18 layers",
    ),
    Finding(
        "At equal loss the weakly causal crosscoder needs more latents than the acausal one",
        EqualLoss("num_latents", "weakly-causal", "acausal"),
        1.25,
        "3 to 4 of 18 layers",
    ),
    Finding(
        "At equal loss the weakly causal crosscoder needs more FLOPs than per-layer SAEs",
        EqualLoss("flops_per_row", "weakly-causal", "per-layer"),
        1.0,
        "slightly more",
    ),
    Finding(
        "At equal loss the acausal crosscoder needs more FLOPs than the weakly causal one",
        EqualLoss("flops_per_row", "acausal", "weakly-causal"),
        1.0,
        "slightly more",
    ),
    Finding(
        "At equal FLOPs and coefficient more latents are active in all SAEs together than in the acausal crosscoder",
        EqualFlops("l0"),
        4.0,
        "15 to 40 of 18 layers, which is 5 to 13 of 6",
    ),
    Finding(
        "At equal FLOPs and coefficient the SAEs' error is larger than the acausal crosscoder's",
        EqualFlops("error"),
        1.0,
        "larger",
    ),
    Finding(
        "BatchTopK, equal FLOPs, equal total L0: the acausal crosscoder explains more variance than per-layer SAEs",
        MoreVariance("acausal", "per-layer", ((256, 256), (512, 512))),
        0.05,
        "none; follows from the lower L0",
    ),
    Finding(
        "BatchTopK, equal latents, equal total L0: the acausal crosscoder explains more than the weakly causal one",
        MoreVariance("acausal", "weakly-causal", ((1536, 256),)),
        0.01,
        "none",
    ),
    Finding(
        "BatchTopK, equal latents, equal total L0: the weakly causal crosscoder explains more than per-layer SAEs",
        MoreVariance("weakly-causal", "per-layer", ((256, 256),)),
        0.01,
        "none",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """One finding decided: the number for every seed, its mean and interval, in the unit of the effect.

    `ends` are ratios at the highest and the lowest loss that both curves reach, means over seeds; they decide nothing.
    """

    finding: Finding
    per_seed: tuple[float, ...]
    middle: float
    interval: tuple[float, float] | None
    word: Literal["confirmed", "refuted", "inconclusive"]
    ends: tuple[float, float] | None = None


def decide(finding: Finding, cells: Cells, seeds: Sequence[int]) -> Verdict:
    """The verdict on one finding, by the rule above."""
    is_ratio = not isinstance(finding.measure, MoreVariance)
    unit: Callable[[float], float] = exp if is_ratio else float
    found = [v for v in (finding.measure.value(cells, seed) for seed in seeds) if isfinite(v)]
    middle = unit(mean(found)) if found else nan
    shown, ends = tuple(unit(v) for v in found), _ends(finding, cells, seeds)
    if len(found) < FEWEST:
        return Verdict(finding, shown, middle, None, "inconclusive", ends)
    _, lowest, highest = interval(found)
    low, high = unit(lowest), unit(highest)
    word = "confirmed" if low > finding.effect else "refuted" if high < finding.effect else "inconclusive"
    return Verdict(finding, shown, middle, (low, high), word, ends)


def _ends(finding: Finding, cells: Cells, seeds: Sequence[int]) -> tuple[float, float] | None:
    if not isinstance(finding.measure, EqualLoss):
        return None
    found = [ratios for seed in seeds if (ratios := finding.measure.along(cells, seed)) is not None]
    return (exp(mean(r[-1] for r in found)), exp(mean(r[0] for r in found))) if found else None


def curve(cells: Cells, wiring: str, size: Size, *, seed: int) -> list[tuple[float, float]]:
    """(loss, log size) of every L1 dictionary of a wiring, loss ascending."""
    return sorted((c["loss"], log(c[size])) for c in cells if _is(c, "l1", wiring, seed))


def common_levels(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> np.ndarray | None:
    """Losses that both curves reach between their sizes; None where there are none."""
    if not a or not b:
        return None
    low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    return np.linspace(low, high, LEVELS) if low < high else None


def at_loss(points: Sequence[tuple[float, float]], levels: np.ndarray) -> np.ndarray:
    """Log sizes at these losses, interpolated."""
    losses, sizes = zip(*points, strict=True)
    return np.interp(levels, losses, sizes)


def _is(cell: Cell, sparsity: str, wiring: str, seed: int) -> bool:
    return (cell["sparsity"], cell["wiring"], cell["seed"]) == (sparsity, wiring, seed)
