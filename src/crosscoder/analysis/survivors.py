"""The latents that survive: beyond the cut-offs that null crosscoders set, or, without controls, the most extreme ones.

A latent survives for a side where its specificity by latent scaling lies beyond the side's calibrated cut-off, or by
norm where scaling has no meaning for the pair. Whoever reads a list of latents is told which of the two it is. Norms
have no say where there is scaling: in null pairs latents that hold noise have more extreme norms than any latent of a
real fine-tune, so that a cut-off on norms finds nothing, or what chance finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.analysis.pair_controls import CalibratedScore, PairControls
from crosscoder.analysis.specificity import SIDES, Specificity

NUM_SHOWN = 12


@dataclass(frozen=True)
class Survivors:
    """Latents of one side by `score`, most specific first; `calibrated` has the cut-off they are beyond, if any.

    A latent beyond both sides' cut-offs is of the side that it is more specific to. Without a cut-off `latents` are
    only the most extreme, whatever a null would say, and at most as many as were asked for.
    """

    side: str
    score: str
    latents: tuple[int, ...]
    calibrated: CalibratedScore | None

    @property
    def survive(self) -> bool:
        """Whether they lie beyond a cut-off at all."""
        return self.calibrated is not None


def survivors(found: Specificity, controls: PairControls | None, *, num_shown: int = NUM_SHOWN) -> dict[str, Survivors]:
    """Of each side: all latents beyond its cut-off, or the most extreme `num_shown` where nothing was calibrated."""
    score = "scaling" if "scaling" in found.names else "norm"
    by_side: dict[str, Survivors] = {}
    for side in SIDES:
        calibrated = None if controls is None else controls.score(score, side)
        values = found.score(score, side)
        own = values >= found.score(score, "a" if side == "b" else "b")
        if calibrated is not None:
            latents = _ranked(values, calibrated.cut.beyond(values) & own)
        else:
            latents = _ranked(values, own & (values > (0.5 if score == "norm" else 0.0)))[:num_shown]
        by_side[side] = Survivors(side, score, tuple(latents), calibrated)
    return by_side


def ranking(found: Specificity, *, score: str, side: str) -> Int[Tensor, "some"]:
    """Latents with a part in the comparison, most specific first."""
    values = found.score(score, side)
    return torch.tensor(_ranked(values, values.isfinite()), dtype=torch.int64)


def _ranked(values: Float[Tensor, "latents"], among: Tensor) -> Sequence[int]:
    order = torch.where(among, values, -torch.inf).argsort(descending=True, stable=True)
    return order[: int(among.sum())].tolist()
