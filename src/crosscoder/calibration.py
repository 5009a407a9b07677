"""The inference threshold of BatchTopK: from held rows, from the batches of training, or as thresholds of JumpReLU.

Each budget of latents (groups that share a k) has its threshold τ on the score `p_i · g_i`; at inference `score > τ`.
Since `p_i · g_i > τ  ⇔  p_i > τ / g_i`, a calibrated BatchTopK crosscoder is a JumpReLU one with `θ_i = τ / g_i`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoder.codes import SparseCode
from crosscoder.errors import ConfigError, TextError
from crosscoder.groups import GroupLayout
from crosscoder.kernels.cuts import Cut
from crosscoder.nonlinearities import BatchTopK, Budget, JumpReLU

if TYPE_CHECKING:
    from crosscoder.crosscoder import Crosscoder

NEVER = 1e30
"""A threshold that nothing exceeds, and finite, so that training on gives numbers."""


@torch.no_grad()
def calibrate(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ reads"]]) -> None:
    """Set each threshold to the score that `k` latents per row exceed on average over `batches` (raw packed reads).

    Other nonlinearities have no threshold to calibrate, and stay as they are. Of each batch the 2k largest scores per
    row are held, which suffices unless batches differ wildly in density.
    """
    kind = crosscoder.nonlinearity
    if not isinstance(kind, BatchTopK):
        return
    was_training, rows, cuts = crosscoder.training, 0, crosscoder.cuts
    scores: list[list[Tensor]] = [[] for _ in crosscoder.budgets]
    crosscoder.train()
    crosscoder.cuts = [Cut() for _ in cuts]  # those of training are of another k
    try:
        for x in batches:
            activity = crosscoder.activity(crosscoder.normalise_reads(x.to(crosscoder.bias.dtype)), k=2 * kind.k)
            for held, found in zip(scores, budget_scores(crosscoder, activity.groups), strict=True):
                held.append(found)
            rows += activity.num_rows
    finally:
        crosscoder.train(was_training)
        crosscoder.cuts = cuts
    if not rows:
        raise TextError("expected rows to calibrate on; got none.", hint="Give some training rows.")
    for held, budget in zip(scores, crosscoder.budgets, strict=True):
        _set_threshold(crosscoder, budget, _cut(torch.cat(held), budget.k * rows))


@torch.no_grad()
def follow(crosscoder: Crosscoder, codes: Sequence[SparseCode], *, memory: float) -> None:
    """Move each threshold towards the lowest score that a training batch kept: `τ ← memory τ + (1 − memory) lowest`."""
    for budget, scores in zip(crosscoder.budgets, budget_scores(crosscoder, codes), strict=True):
        if scores.numel():
            old = crosscoder.weights[budget.groups[0]].threshold
            lowest = torch.where(scores > 0, scores, torch.inf).min()
            lowest = torch.where(lowest.isinf(), old, lowest)
            old = torch.where(old.isnan(), lowest, old)
            _set_threshold(crosscoder, budget, memory * old + (1 - memory) * lowest)


@torch.no_grad()
def as_jumprelu(crosscoder: Crosscoder, *, bandwidth: float) -> Crosscoder:
    """The same codes in eval mode, but for rounding at the cut, with a threshold for every latent on its own.

    Raises NotCalibrated without thresholds, ConfigError for other nonlinearities.
    """
    if not isinstance(crosscoder.nonlinearity, BatchTopK):
        raise ConfigError(f"only BatchTopK has thresholds to convert; this is {crosscoder.nonlinearity.kind}.")
    gate = crosscoder.gate
    thresholds = torch.where(gate > 0, crosscoder.thresholds / gate, NEVER)  # a score of 0 exceeds no threshold
    thresholds = thresholds.clamp(min=1 / NEVER)  # so that the logarithm of a threshold of 0 can be trained
    made = deepcopy(crosscoder)
    made.nonlinearity, made.budgets = JumpReLU(bandwidth=bandwidth), []
    made.wiring = crosscoder.wiring.without_k()
    made.layouts = [GroupLayout(group, made.wiring) for group in made.wiring]
    for weights, part in zip(made.weights, thresholds.split([len(w.gate) for w in made.weights]), strict=True):
        weights.log_threshold = nn.Parameter(part.log().to(weights.encoder))
        weights.threshold.fill_(float("nan"))
    return made.eval()


def budget_scores(crosscoder: Crosscoder, codes: Sequence[SparseCode]) -> list[Float[Tensor, "pairs"]]:
    """The scores of the active pairs, budget by budget; one code per group."""
    scores = [code.values * w.gate[code.latents] for code, w in zip(codes, crosscoder.weights, strict=True)]
    return [torch.cat([scores[i] for i in budget.groups]) for budget in crosscoder.budgets]


def _cut(scores: Float[Tensor, "pairs"], count: int) -> Tensor:
    """Between the `count` largest scores and the rest; 0 where there are no more."""
    if scores.numel() <= count:
        return scores.new_zeros(())
    return scores.sort(descending=True).values[count - 1 : count + 1].mean()


def _set_threshold(crosscoder: Crosscoder, budget: Budget, threshold: Tensor) -> None:
    for i in budget.groups:
        crosscoder.weights[i].threshold.copy_(threshold)
