"""What a report is made from: everything measured, nothing drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.analysis.classes import LatentClasses
from crosscoder.analysis.label_scores import LabelScores
from crosscoder.analysis.latent_cards import LatentCard


@dataclass(frozen=True)
class ReportData:
    """All that a report says. `facts` are names and values for the head; `evaluation` is evaluation.json.

    `density` and `cards` belong to the latents of `classes`; `named` are best latents of labels that are not among the
    most specific.
    """

    classes: LatentClasses
    facts: Mapping[str, str]
    evaluation: Mapping[str, Any]
    density: np.ndarray
    cards: Mapping[int, LatentCard]
    most_a: Sequence[int]
    most_b: Sequence[int]
    named: Sequence[int] = ()
    labels: LabelScores | None = None
    exemplars_per_card: int = 5


def optional(value: float | None) -> str:
    """A number with three digits, or nothing."""
    return "" if value is None else f"{value:.3f}"
