"""Cut-offs that a null pair decides: calibrated on some of its seeds, tested on others, then put to the real pair.

For a score of latents (`specificity`) the cut is the smallest null score such that of all n null scores of the
calibrating seeds only m lie beyond it, where m is the largest number whose upper 95 % bound on the share (Clopper and
Pearson) is within the wanted share: an order statistic with a tolerance bound, not the plain quantile, which half of
all samples would exceed. Beyond is `>`. Where n is too small for any such m the cut is the largest null score, and
`assured` is False. On seeds that had no part in it the share beyond the cut is then measured, with an upper bound.

    expected = (share beyond the cut of unseen null seeds) · (live latents of the pair)
    false discovery rate = expected / found, 1 at most
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.analysis.shares import CONFIDENCE, Share, most_allowed, share_of
from crosscoder.errors import TextError

Score = Literal["norm", "scaling", "joint"]
SideName = Literal["a", "b"]
WANTED_SHARE = 0.002
NUM_BINS = 50


@dataclass(frozen=True)
class Cut:
    """Latents with a `score` above `value` are called specific to `side`; where the value comes from.

    `num_beyond` of `num_latents` null scores lie beyond it. `assured`: their upper bound is within `wanted_share`.
    """

    score: Score
    side: SideName
    value: float
    wanted_share: float
    seeds: tuple[int, ...]
    num_latents: int
    num_beyond: int
    assured: bool

    def beyond(self, scores: Float[Tensor, "latents"]) -> Tensor:
        """Which latents lie beyond, (latents,) bool; NaN never does."""
        return scores > self.value


@dataclass(frozen=True)
class NullTest:
    """The false-exclusive share on null seeds that did not decide the cut."""

    seeds: tuple[int, ...]
    false_share: Share


@dataclass(frozen=True)
class Found:
    """Latents of one crosscoder beyond a cut, how many its null leads one to expect, and so what part is false.

    `false_discovery_rate_upper` takes the upper bound of the null's share. Rates are None where nothing was found.
    """

    run: str
    num_latents: int
    num_beyond: int
    expected: float
    false_discovery_rate: float | None
    false_discovery_rate_upper: float | None


def calibrate(
    scores: Mapping[int, Float[Tensor, "_"]],
    *,
    score: Score,
    side: SideName,
    wanted_share: float = WANTED_SHARE,
    confidence: float = CONFIDENCE,
) -> Cut:
    """The cut from the scores of the calibrating null seeds; NaN (no part in the comparison) is left out."""
    pooled = np.sort(np.concatenate([finite(values) for values in scores.values()]))[::-1]
    if not len(pooled):
        raise TextError(
            f"expected null latents with a score {score!r} to calibrate on; got none.",
            hint="No latent of the null crosscoders is active often enough: give a longer run or more held-out text.",
        )
    allowed = most_allowed(len(pooled), wanted_share, confidence=confidence)
    value = float(pooled[allowed or 0])
    return Cut(
        score=score,
        side=side,
        value=value,
        wanted_share=wanted_share,
        seeds=tuple(scores),
        num_latents=len(pooled),
        num_beyond=int((pooled > value).sum()),
        assured=allowed is not None,
    )


def check_cut(cut: Cut, scores: Mapping[int, Float[Tensor, "_"]], *, confidence: float = CONFIDENCE) -> NullTest | None:
    """The cut on null seeds that it was not calibrated on; None where there are none: it is then not tested."""
    if not scores:
        return None
    assert not set(scores) & set(cut.seeds), "a cut is tested on other seeds than it was calibrated on"
    each = [finite(values) for values in scores.values()]
    beyond = [int((values > cut.value).sum()) for values in each]
    return NullTest(tuple(scores), share_of(beyond, list(map(len, each)), confidence=confidence))


def found_beyond(cut: Cut, test: NullTest | None, scores: Float[Tensor, "_"], *, run: str) -> Found:
    """How many latents of a crosscoder lie beyond, and are expected to: by the tested share, else the wanted one."""
    values = finite(scores)
    number = int((values > cut.value).sum())
    share = cut.wanted_share if test is None else test.false_share.share
    upper = None if test is None else test.false_share.upper
    return Found(
        run=run,
        num_latents=len(values),
        num_beyond=number,
        expected=share * len(values),
        false_discovery_rate=_rate(share, len(values), number),
        false_discovery_rate_upper=None if upper is None else _rate(upper, len(values), number),
    )


def histogram(scores: Sequence[Float[Tensor, "_"]]) -> tuple[int, ...]:
    """How many scores lie in each of `NUM_BINS` equal bins from 0 to 1, over all seeds."""
    pooled = np.concatenate([finite(values) for values in scores]) if scores else np.zeros(0)
    return tuple(np.histogram(pooled, NUM_BINS, (0.0, 1.0))[0].tolist())


def finite(scores: Float[Tensor, "_"]) -> Float[np.ndarray, "_"]:
    """The scores that are numbers."""
    return scores[torch.isfinite(scores)].detach().double().cpu().numpy()


def _rate(share: float, num_latents: int, num_beyond: int) -> float | None:
    return None if num_beyond == 0 else min(1.0, share * num_latents / num_beyond)
