"""Cut: where the last selection of a budget ended, from which the next one starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Cut:
    """Where the last selection of one budget ended, from which the next one starts; what is kept does not depend on
    it.
    """

    score: float = 0.0
    """The last threshold; 0 before the first."""
    margin: float = 0.05
    """How far below it the next cut lies, as a share of it; follows how far thresholds move."""
    slack: float = 0.0
    """By how much the proposing product may err, in units of scores."""
    on_device: Tensor | None = field(default=None, compare=False)
    """The next cut, where it never leaves a device; a device that has none estimates one."""
    doubtful: Tensor | None = field(default=None, compare=False)
    """How many selections on a device could not be shown to be exact."""

    @property
    def guess(self) -> float:
        """The cut to try first; not positive before the first selection."""
        return self.score * (1 - self.margin) - self.slack

    def learn(self, score: float, *, deviation: float) -> None:
        """Take note of the threshold that a selection ended at."""
        moved = abs(score - self.score) / self.score if self.score else 0.0
        self.margin = min(0.3, max(0.02, 0.95 * self.margin, 2 * moved))
        self.score, self.slack = score, 3 * deviation

    @property
    def saved(self) -> dict[str, float]:
        """What a checkpoint keeps, so that a resumed run takes the same turns."""
        return {"score": self.score, "margin": self.margin, "slack": self.slack}
