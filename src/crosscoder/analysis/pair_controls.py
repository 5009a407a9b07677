"""What the controls of a pair say, in `controls/summary.json`: cut-offs, their test, partners, stability, baselines.

`crosscoder controls` writes it; whoever reports on the pair reads it with `read_controls`. Sides are `a` and `b`,
scores those of `specificity`. A summary belongs to one crosscoder and one analysis set: compare `fingerprint`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from crosscoder import files
from crosscoder.analysis.baselines import FirstTokens, PrincipalComponents
from crosscoder.analysis.calibrated import Cut, Found, NullTest
from crosscoder.analysis.controls import Band, CountsBeyond
from crosscoder.errors import FileFormatError
from crosscoder.training.json_numbers import json_values

SUMMARY, CONTROLS = "summary.json", "controls"
_THING = "controls"


@dataclass(frozen=True)
class ControlResult:
    """One finished control: what it is (`kind`, `about`), its size, and how well it reads its sources.

    `kind` is null, identical, partner, repeat, difference or sae. `like_for_like`: nothing of the run was overridden.
    """

    name: str
    kind: str
    about: str
    seed: int
    num_latents: int
    num_live: int
    num_rows: int
    fve: float
    l0: float
    dead_fraction: float
    like_for_like: bool


@dataclass(frozen=True)
class CalibratedScore:
    """One score of one side: the cut, its test on unseen null seeds (None: not tested), and what lies beyond it.

    `pair` is the real pair; `partners`, `identical` and `repeats` are controls beyond the same cut. Histograms have
    `calibrated.NUM_BINS` equal bins from 0 to 1: null scores of all seeds, and scores of the real pair.
    """

    cut: Cut
    test: NullTest | None
    pair: Found
    partners: tuple[Found, ...]
    identical: Found | None
    repeats: tuple[Found, ...]
    null_histogram: tuple[int, ...]
    histogram: tuple[int, ...]

    @property
    def by_chance(self) -> str:
        """How many latents of the pair a null leads one to expect beyond the cut, and at most, in words."""
        if self.test is None:
            return f"{self.pair.expected:.1f} expected if the cut-off holds, which was not tested"
        most = self.test.false_share.upper * self.pair.num_latents
        return f"{self.pair.expected:.1f} expected by chance, at most {most:.1f}"


@dataclass(frozen=True)
class Stability:
    """How far a repeat of the run with another seed finds the same latents (`stability`).

    Shares of live latents that come back: have a mutual match there with at least the cut, by decoder cosine and by the
    correlation of values on the run's analysis set (None where the joint sums are too large). `beyond` and
    `beyond_again`: of latents beyond a cut here, by `score/side`, those whose match there lies beyond it too.
    """

    run: str
    num_live: int
    cosine_cut: float
    share_by_decoder: float | None
    median_cosine: float | None
    correlation_cut: float
    share_by_activation: float | None
    median_correlation: float | None
    beyond: dict[str, int]
    beyond_again: dict[str, int]


@dataclass(frozen=True)
class PairControls:
    """All controls of the pair (a, b); `fingerprint` is that of the run whose latents they judge.

    `band` holds the middle 99.8 % of relative norms of the calibrating null seeds, `beyond_band` what lies outside it:
    of the real pair, and of the null seeds that had no part in it (None without such seeds).
    """

    a: str
    b: str
    fingerprint: str
    calibration_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    scores: tuple[CalibratedScore, ...]
    band: Band | None
    beyond_band: CountsBeyond | None
    null_beyond_band: CountsBeyond | None
    runs: tuple[ControlResult, ...]
    stability: tuple[Stability, ...]
    first_tokens: FirstTokens | None
    components: PrincipalComponents | None
    notes: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether there is a null control at all."""
        return len(self.calibration_seeds) > 0

    def score(self, name: str, side: str) -> CalibratedScore | None:
        """The calibrated score of that name and side."""
        return next((s for s in self.scores if (s.cut.score, s.cut.side) == (name, side)), None)

    def named(self, kind: str) -> tuple[ControlResult, ...]:
        """The controls of one kind."""
        return tuple(result for result in self.runs if result.kind == kind)

    def table(self) -> pa.Table:
        """One row per score and side."""
        return pa.Table.from_pylist([_row(each) for each in self.scores])

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return json_values(asdict(self))


def write_controls(out: Path, controls: PairControls) -> Path:
    """Put one pair into the summary of the run at `out`, beside those of other pairs; gives the summary's path."""
    path = out / CONTROLS / SUMMARY
    others = [pair for pair in _pairs(path) if (pair["a"], pair["b"]) != (controls.a, controls.b)]
    files.write_json(path, {"format": f"crosscoder.{_THING}/1", "pairs": [*others, controls.to_json()]})
    return path


def read_controls(out: str | Path, *, a: str, b: str) -> PairControls | None:
    """The controls of the pair of source keys in the run directory `out`; None where there are none of it.

    Raises FileFormatError for a summary that is damaged or newer.
    """
    path = Path(out) / CONTROLS / SUMMARY
    found = [pair for pair in _pairs(path) if (pair["a"], pair["b"]) == (a, b)]
    if not found:
        return None
    try:
        return TypeAdapter(PairControls).validate_python(found[0])
    except ValidationError as error:
        raise FileFormatError(
            f"{path} does not describe controls.",
            details=[f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:8]],
            hint="Write it again: crosscoder controls on the run does so from the finished controls.",
        ) from error


def _pairs(path: Path) -> list[dict[str, Any]]:
    return files.read_json(path, thing=_THING)["pairs"] if path.is_file() else []


def _row(score: CalibratedScore) -> dict[str, Any]:
    test = score.test
    return {
        "score": score.cut.score,
        "side": score.cut.side,
        "cut": score.cut.value,
        "null_share": None if test is None else test.false_share.share,
        "null_share_upper": None if test is None else test.false_share.upper,
        "beyond": score.pair.num_beyond,
        "expected": score.pair.expected,
        "false_discovery_rate": score.pair.false_discovery_rate,
    }
