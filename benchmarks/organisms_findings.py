"""From cells to numbers: cut-offs from null organisms, recall of plants at them, and effects on behaviour.

A method recalls a label when, of the latents that it calls the organism's (score beyond the cut-off), the one that
detects the label best on half of the documents has an AUROC of at least 0.9 on the other half. Cut-offs are those of
`crosscoder.analysis.calibrated`, from null organisms; others test them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from organisms_methods import READINGS
from torch import Tensor
from verdicts import Interval, interval

from crosscoder.analysis.shares import Share, most_allowed, share_of
from crosscoder.synthetic.curves import wilson

CALIBRATION_SEEDS = (0, 1, 2)
TEST_SEEDS = (3, 4, 5)
WANTED_SHARE = 0.005
DETECTS = 0.9
TOP = 10
DIRECTION = "mean difference"
METHODS = (*READINGS, DIRECTION)
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Calibration:
    """A method's cut-off, and what of unseen null organisms lies beyond it; `test` is None where there are none.

    `assured`: the upper 95 % bound on the share of null latents beyond is within `WANTED_SHARE`. For the direction the
    cut-off is on its length, and a null seed counts once.
    """

    method: str
    value: float
    seeds: tuple[int, ...]
    num_latents: int
    assured: bool
    test_seeds: tuple[int, ...]
    test: Share | None


@dataclass(frozen=True)
class Recall:
    """One label of one cell, as one method reads it.

    `auroc` is that of the chosen latent on the documents that did not choose it (0.5 where none was called), `in_top`
    that of the best of the method's first ten, `at_best` that of the best latent of the dictionary, whatever its score.
    """

    organism: str
    seed: int
    label: str
    method: str
    num_called: int
    auroc: float
    in_top: float
    at_best: float

    @property
    def found(self) -> bool:
        """Whether the label is recalled."""
        return self.auroc >= DETECTS


def calibrations(cells: Iterable[Cell]) -> dict[str, Calibration]:
    """The cut-off of every method, as far as null cells are there."""
    nulls = {cell["seed"]: cell for cell in cells if cell["plant"] is None}
    found: dict[str, Calibration] = {}
    for method in METHODS:
        by_seed = {seed: null_scores(cell, method) for seed, cell in sorted(nulls.items())}
        calibrating = {seed: values for seed, values in by_seed.items() if seed in CALIBRATION_SEEDS}
        if any(bool(values.isfinite().any()) for values in calibrating.values()):
            unseen = {seed: values for seed, values in by_seed.items() if seed in TEST_SEEDS}
            found[method] = calibrate(method, calibrating, unseen)
    return found


def calibrate(method: str, calibrating: Mapping[int, Tensor], unseen: Mapping[int, Tensor]) -> Calibration:
    """The smallest null score beyond which few enough lie, as `crosscoder.analysis.calibrated` has it; and its test."""
    pooled = torch.cat([values[values.isfinite()] for values in calibrating.values()]).sort(descending=True).values
    allowed = most_allowed(len(pooled), WANTED_SHARE)
    value = float(pooled[allowed or 0])
    beyond = [int((values > value).sum()) for values in unseen.values()]
    totals = [int(values.isfinite().sum()) for values in unseen.values()]
    test = share_of(beyond, totals) if sum(totals) else None
    return Calibration(method, value, tuple(calibrating), len(pooled), allowed is not None, tuple(unseen), test)


def null_scores(cell: Cell, method: str) -> Tensor:
    """Scores of the live latents of a cell; for the direction its length."""
    if method == DIRECTION:
        return torch.tensor([cell[DIRECTION]["length"]], dtype=torch.float64)
    values = cell["dictionaries"][READINGS[method]]["scores"][method]
    return torch.tensor([nan if value is None else value for value in values], dtype=torch.float64)


def recalls(cells: Iterable[Cell], calibrated: Mapping[str, Calibration]) -> list[Recall]:
    """Every label of every planted cell by every calibrated method."""
    return [
        recall(cell, label, calibration)
        for cell in cells
        if cell["plant"] is not None
        for label in cell["labels"]
        for calibration in calibrated.values()
    ]


def recall(cell: Cell, label: str, calibration: Calibration) -> Recall:
    """One label of one cell by one method."""
    method, scores = calibration.method, null_scores(cell, calibration.method)
    called = scores > calibration.value
    if method == DIRECTION:
        auroc = float(cell[DIRECTION]["detections"][label]["scoring"])
        aurocs = (auroc if bool(called) else 0.5, auroc, auroc)
    else:
        detected = cell["dictionaries"][READINGS[method]]["detections"][label]
        top = torch.zeros_like(called)
        order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:TOP]
        top[order] = scores[order].isfinite()
        aurocs = tuple(chosen_auroc(detected, which) for which in (called, top, torch.ones_like(called)))
    return Recall(cell["organism"], cell["seed"], label, method, int(called.sum()), *aurocs)


def chosen_auroc(detected: Mapping[str, Sequence[float]], among: Tensor) -> float:
    """AUROC on the scoring half of the latent that is best on the choosing half, among some; 0.5 for none."""
    choosing = torch.tensor(detected["choosing"], dtype=torch.float64).nan_to_num(nan=-1.0)
    if not bool(among.any()):
        return 0.5
    return float(detected["scoring"][int(choosing.masked_fill(~among, -2.0).argmax())])


def over_seeds(found: Sequence[Recall], value: str = "found") -> Interval:
    """Mean and t interval over seeds of a number's mean over the labels of a seed."""
    seeds = sorted({one.seed for one in found})
    means = [_mean([float(getattr(one, value)) for one in found if one.seed == seed]) for seed in seeds]
    return interval(means)


def share(found: Sequence[Recall]) -> tuple[int, int, float, float]:
    """Labels recalled, of how many, and Wilson's interval."""
    hits, total = sum(one.found for one in found), len(found)
    return (hits, total, *(wilson(hits, total) if total else (nan, nan)))


@dataclass(frozen=True)
class Effect:
    """An edit of one organism, pooled over seeds: rates with Wilson's intervals, drop in points over seeds, mean KL."""

    organism: str
    edit: str
    hits: int
    total: int
    rate: Interval
    drop: Interval
    kl: float


def effects(cells: Sequence[Cell]) -> list[Effect]:
    """Every edit of every planted organism."""
    found: list[Effect] = []
    for organism in dict.fromkeys(cell["organism"] for cell in cells if cell["effects"]):
        mine = [cell["effects"] for cell in cells if cell["organism"] == organism]
        found += [effect(organism, edit, mine) for edit in mine[0] if all(edit in one for one in mine)]
    return found


def effect(organism: str, edit: str, seeds: Sequence[Mapping[str, Any]]) -> Effect:
    """One edit of one organism."""
    hits, total = (sum(one[edit][key] for one in seeds) for key in ("hits", "total"))
    drops = [
        one["unedited"]["hits"] / one["unedited"]["total"] - one[edit]["hits"] / one[edit]["total"] for one in seeds
    ]
    rate = Interval(hits / total, *wilson(hits, total))
    return Effect(organism, edit, hits, total, rate, interval(drops), _mean([one[edit]["kl"] for one in seeds]))


def mean_drops(cells: Sequence[Cell], edit: str) -> Interval:
    """Mean drop over organisms in every seed, with a t interval over seeds."""
    by_seed: dict[int, list[float]] = {}
    for cell in cells:
        if edit in cell["effects"]:
            of, clean = cell["effects"][edit], cell["effects"]["unedited"]
            by_seed.setdefault(cell["seed"], []).append(clean["hits"] / clean["total"] - of["hits"] / of["total"])
    return interval([_mean(drops) for drops in by_seed.values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
