"""Findings of the literature, registered before the runs that decide them, and the rule that decides.

A finding says which number should be on which side of which effect. The number is a measure of one kind of cell, or the
difference of two, of the same seed (so of the same world, rows and initial weights). With the interval over seeds of
`verdicts.py`:

    confirmed       the whole interval is beyond the effect, on the side that the finding says
    refuted         the whole interval is on the other side of the effect
    inconclusive    the interval holds the effect, or the number is undefined in more than n − 3 seeds

A ratio of densities is taken as a logarithm. What is undefined (a density of no latents) is left out, and counted.
Seeds that agree to the last digit give an interval of no width; where the number is a fraction of concepts (`trials`),
Wilson's interval of the pooled count takes its place. This was added after the first report, and weakened one verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log, nan
from typing import Any, Literal

from verdicts import FEWEST, interval

from crosscoder.synthetic.curves import wilson

SECOND_SEEDS = tuple(range(10, 18))
"""Fresh seeds of a second round, registered when the first had left findings open, before any of them was trained."""

Cells = Mapping[str, Mapping[str, Any]]
"""Results by the name of their cell."""


@dataclass(frozen=True)
class Measure:
    """One number of the cells of one arena, architecture and sparsity; `cuts` names the published cut-offs."""

    arena: str
    architecture: str
    sparsity: str
    field: str
    cuts: str = "dfc"
    across: str = "same"

    def values(self, cells: Cells, seeds: Sequence[int]) -> list[float]:
        """The number for every seed; NaN where it is undefined or the cell is missing."""
        return [self._value(cells.get(self.cell(seed))) for seed in seeds]

    def cell(self, seed: int) -> str:
        """The name of the cell."""
        return f"{self.arena}--{self.architecture}--{self.sparsity}--{self.across}--{seed}"

    def _value(self, cell: Mapping[str, Any] | None) -> float:
        if cell is None:
            return nan
        found = cell[self.field] if self.field in cell else cell["cuts"][self.cuts][self.field]
        return nan if found is None else float(found)


@dataclass(frozen=True)
class Finding:
    """A claim: `measure` (minus `minus`) lies `direction` the `effect`; `log_scale` where both are ratios."""

    name: str
    claim: str
    source: str
    measure: Measure
    direction: Literal["above", "below"]
    effect: float
    minus: Measure | None = None
    log_scale: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    trials: int | None = None
    """Concepts per seed that the number is a fraction of, where it is one."""
    per: float = 1.0
    """What the fraction is multiplied by."""

    def numbers(self, cells: Cells) -> list[float]:
        """The number of every seed, on the scale of the effect before any logarithm is undone."""
        first = [self._scaled(value) for value in self.measure.values(cells, self.seeds)]
        if self.minus is None:
            return first
        other = [self._scaled(value) for value in self.minus.values(cells, self.seeds)]
        return [a - b for a, b in zip(first, other, strict=True)]

    def _scaled(self, value: float) -> float:
        if not self.log_scale:
            return value
        return log(value) if value > 0 else nan


@dataclass(frozen=True)
class Verdict:
    """What the seeds say: mean and interval on the scale of the effect, and how many seeds were defined."""

    finding: Finding
    mean: float
    low: float
    high: float
    num_defined: int
    verdict: Literal["confirmed", "refuted", "inconclusive"]

    def to_json(self) -> dict[str, Any]:
        """The verdict with what was registered."""
        kept = ("name", "claim", "source", "direction", "effect", "seeds")
        registered = {key: getattr(self.finding, key) for key in kept}
        numbers = {"mean": self.mean, "low": self.low, "high": self.high, "num_defined": self.num_defined}
        return registered | numbers | {"verdict": self.verdict}


def judge(finding: Finding, cells: Cells) -> Verdict:
    """The verdict by the rule above."""
    numbers = finding.numbers(cells)
    defined = sum(isfinite(number) for number in numbers)
    middle, low, high = interval(numbers)
    if low == high and finding.trials is not None:
        number = finding.trials * defined
        low, high = (finding.per * end for end in wilson(round(middle / finding.per * number), number))
    effect = log(finding.effect) if finding.log_scale else finding.effect
    above, below = low > effect, high < effect
    verdict: Literal["confirmed", "refuted", "inconclusive"] = "inconclusive"
    if defined >= FEWEST and (above or below):
        verdict = "confirmed" if above == (finding.direction == "above") else "refuted"
    back = exp if finding.log_scale else float
    return Verdict(finding, back(middle), back(low), back(high), defined, verdict)


def _density(arena: str, architecture: str = "plain") -> Measure:
    return Measure(arena, architecture, "l1", "density_ratio", cuts="anthropic")


def _recall(
    arena: str, architecture: str, sparsity: str = "batchtopk", cuts: str = "dfc", across: str = "same"
) -> Measure:
    return Measure(arena, architecture, sparsity, "recall", cuts=cuts, across=across)


FEB25 = "Anthropic, Insights on Crosscoder Model Diffing, February 2025"
DFC = "Jiralerspong & Bricken 2026, arXiv 2602.11729"
MINDER = "Minder et al. 2025, arXiv 2504.02922"

FINDINGS = (
    Finding(
        "1 overcomplete",
        "With 450 concepts and 4,096 latents (L1), exclusive latents are no denser than shared: median ratio < 1.5.",
        FEB25,
        _density("overcomplete"),
        "below",
        1.5,
        log_scale=True,
        seeds=(0, 1, 2),
    ),
    Finding(
        "2 tight",
        "With 700 concepts and 1,024 latents (L1), exclusive latents are clearly denser: median ratio > 2.",
        FEB25,
        _density("tight"),
        "above",
        2.0,
        log_scale=True,
        seeds=(0, 1, 2),
    ),
    Finding(
        "3 designated closes the gap",
        "There, designated shared latents lower the ratio of densities against plain, at least 1.5-fold.",
        FEB25,
        _density("tight"),
        "above",
        1.5,
        minus=_density("tight", "designated"),
        log_scale=True,
        seeds=(0, 1, 2),
    ),
    Finding(
        "4a dedicated > designated",
        "Fewer latents than concepts (BatchTopK): dedicated recalls at least 5 points more exclusive concepts.",
        DFC,
        _recall("undercomplete", "dedicated"),
        "above",
        0.05,
        minus=_recall("undercomplete", "designated"),
    ),
    Finding(
        "4b designated > plain",
        "Fewer latents than concepts (BatchTopK): designated recalls at least 5 points more than plain.",
        DFC,
        _recall("undercomplete", "designated"),
        "above",
        0.05,
        minus=_recall("undercomplete", "plain"),
    ),
    Finding(
        "4c dedicated > plain",
        "Fewer latents than concepts (BatchTopK): dedicated recalls at least 5 points more than plain.",
        DFC,
        _recall("undercomplete", "dedicated"),
        "above",
        0.05,
        minus=_recall("undercomplete", "plain"),
    ),
    Finding(
        "5a L1 shrinks",
        "450 concepts, 4,096 latents: per 100 shared ones, L1 has at least 1 more latent falsely called exclusive.",
        MINDER,
        Measure("overcomplete", "plain", "l1", "shrunk_per_100", cuts="minder"),
        "above",
        1.0,
        minus=Measure("overcomplete", "plain", "batchtopk", "shrunk_per_100", cuts="minder"),
        seeds=(0, 1, 2),
    ),
    Finding(
        "5b L1 decouples",
        "There, L1 splits at least 1 more of 100 shared concepts into two exclusive latents than BatchTopK.",
        MINDER,
        Measure("overcomplete", "plain", "l1", "decoupled_per_100", cuts="minder"),
        "above",
        1.0,
        minus=Measure("overcomplete", "plain", "batchtopk", "decoupled_per_100", cuts="minder"),
        seeds=(0, 1, 2),
        trials=300,
        per=100.0,
    ),
    Finding(
        "6a narrow concepts are missed",
        "Exclusive concepts on 0.5 % of rows: norms find less than half (BatchTopK).",
        "pulsatrix, latent-scaling toy",
        _recall("narrow", "plain", cuts="minder"),
        "below",
        0.5,
        seeds=(0, 1, 2),
    ),
    Finding(
        "6b common concepts are found",
        "Exclusive concepts on 8 % of rows: norms find at least nine in ten (BatchTopK).",
        "pulsatrix, latent-scaling toy",
        _recall("common", "plain", cuts="minder"),
        "above",
        0.9,
        seeds=(0, 1, 2),
        trials=8,
    ),
    Finding(
        "5a again",
        "5a on eight fresh seeds, after three left it open.",
        MINDER,
        Measure("overcomplete", "plain", "l1", "shrunk_per_100", cuts="minder"),
        "above",
        1.0,
        minus=Measure("overcomplete", "plain", "batchtopk", "shrunk_per_100", cuts="minder"),
        seeds=SECOND_SEEDS,
    ),
    Finding(
        "6a again",
        "6a on eight fresh seeds, after three left it open.",
        "pulsatrix, latent-scaling toy",
        _recall("narrow", "plain", cuts="minder"),
        "below",
        0.5,
        seeds=SECOND_SEEDS,
    ),
)
"""All registered findings. Change one only together with its date and reason in the report."""
