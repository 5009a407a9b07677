"""Encoder biases from data, so that every latent fires on the same fraction of rows from the first step on.

With `q_i` the quantile at 1 − p of latent i's pre-activation without bias, `x̃[R_g] · W_enc_i`, over some rows

    b_enc_i := θ_i − q_i           θ_i = exp(log threshold) under JumpReLU, 0 under ReLU

so that `x̃[R_g] · W_enc_i + b_enc_i > θ_i` on the fraction p of those rows. Latents that never fire get no gradient, and
latents that fire on half the rows cost a dense product each: both are avoided before the first step.
Source: the January 2025 recipe of Anthropic's interpretability team, where p = 10,000 / num_latents, at most 1.
Under TopK and BatchTopK it is refused: there the other latents' scores decide whether one fires, not its bias alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.groups import GroupWeights
from crosscoder.nonlinearities import BatchTopK, TopK

BLOCK_ELEMENTS = 2**24
"""Pre-activations in memory at a time."""


@torch.no_grad()
def set_firing_fraction(crosscoder: Crosscoder, rows: Float[Tensor, "rows width"], fraction: float) -> None:
    """Set every encoder bias such that its latent fires on `fraction` of `rows` (raw, packed over all sources).

    Call it after the normaliser is set. Raises ConfigError under TopK kinds, for a fraction that is not between 0 and
    1, and for fewer rows than it takes for a latent to fire on one of them.
    """
    if isinstance(crosscoder.nonlinearity, TopK | BatchTopK):
        raise ConfigError(
            f"a firing fraction was asked for under {crosscoder.nonlinearity.kind}.",
            hint="There k fixes how often latents fire. Use it with relu or jump_relu.",
        )
    x = _normalised(crosscoder, rows)
    count = round(fraction * len(x)) if 0 < fraction < 1 else 0
    if not 0 < count < len(x):
        raise ConfigError(
            f"expected a firing fraction between 0 and 1, and rows enough for it; got {fraction} and {len(x)} rows.",
            hint="Give at least a few times 1/fraction rows.",
        )
    for group, weights in zip(crosscoder.wiring, crosscoder.weights, strict=True):
        columns = torch.tensor(crosscoder.sources.columns(group.reads), device=x.device)
        cuts = _upper_quantiles(x[:, columns], weights.encoder, count)
        weights.encoder_bias.copy_(_thresholds(weights) - cuts)


def _normalised(crosscoder: Crosscoder, rows: Tensor) -> Tensor:
    if crosscoder.folded_normaliser:
        raise ConfigError("a folded crosscoder is for inference.", hint="Set the biases of one that is to be trained.")
    if not bool(torch.isfinite(rows).all()):
        raise SourceMismatch("the rows hold NaN or infinity.", hint="Give finite activations, packed over all sources.")
    return crosscoder.normalise(rows.to(crosscoder.bias.device, crosscoder.bias.dtype))


def _upper_quantiles(x: Tensor, encoder: Tensor, count: int) -> Float[Tensor, "latents"]:
    """For each latent, what `count` of the rows exceed: half way between two neighbouring pre-activations."""
    cuts: list[Tensor] = []
    for block in encoder.split(max(1, BLOCK_ELEMENTS // len(x))):
        largest = (x @ block.T).topk(count + 1, dim=0).values
        cuts.append(largest[-2:].mean(0))
    return torch.cat(cuts)


def _thresholds(weights: GroupWeights) -> Tensor:
    log_threshold = weights.log_threshold
    return torch.zeros_like(weights.encoder_bias) if log_threshold is None else log_threshold.exp()
