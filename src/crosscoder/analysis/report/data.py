"""What a report is made from: everything measured, nothing drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosscoder.analysis.classes import LatentClasses
from crosscoder.analysis.diff_cards import Unmeasured
from crosscoder.analysis.label_scores import LabelScores
from crosscoder.analysis.latent_cards import LatentCard
from crosscoder.analysis.pair import PairStatistics
from crosscoder.analysis.pair_controls import PairControls
from crosscoder.analysis.survivors import Survivors
from crosscoder.interventions.effects import LatentEffects
from crosscoder.interventions.patching_curves import PatchingCurves


@dataclass(frozen=True)
class ReportData:
    """All that a report says. `facts` are names and values for the head; `evaluation` is evaluation.json.

    `density` and `cards` belong to the latents of `classes`; `most` are those shown of each side; `named` are best
    latents of labels, `changed` the most amplified and attenuated, `by_wiring` those that the wiring gives to one side,
    that are not among them. `stale_controls`: there
    are controls beside the run, but of another crosscoder.
    """

    classes: LatentClasses
    facts: Mapping[str, str]
    evaluation: Mapping[str, Any]
    density: np.ndarray
    cards: Mapping[int, LatentCard]
    most: Mapping[str, Survivors] = field(default_factory=dict)
    named: Sequence[int] = ()
    changed: Sequence[int] = ()
    by_wiring: Sequence[int] = ()
    labels: LabelScores | None = None
    pair: PairStatistics | None = None
    controls: PairControls | None = None
    stale_controls: bool = False
    patching: PatchingCurves | Unmeasured = Unmeasured("it was not asked for.")  # noqa: RUF009
    effects: LatentEffects | Unmeasured = Unmeasured("no latent is shown.")  # noqa: RUF009
    exemplars_per_card: int = 5


def optional(value: float | None) -> str:
    """A number with three digits, or nothing."""
    return "" if value is None else f"{value:.3f}"


def ranged(value: float) -> str:
    """A factor with two digits and its sign of multiplication."""
    return f"{value:.2g} ×"
