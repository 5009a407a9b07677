"""Folding: the normaliser moved into the weights, so that they take raw activations and give raw ones.

With `x̃ = (x − μ) c` at every source,

    W_enc ← W_enc diag(c)    b_enc ← b_enc − W_enc diag(c) μ    W_dec ← W_dec diag(1/c)    b_dec ← b_dec / c + μ
    W_skip ← diag(1/c) W_skip diag(c)                           b_dec ← b_dec − W_skip μ   (the new W_skip)

exactly, for unequal c. Gate, thresholds and c are kept, so that selection and normalised norms stay what they were.
Decoders tied in normalised space differ by `1/c` in raw space: a folded group keeps all its copies and is not tied.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from crosscoder.groups import GroupLayout, GroupWeights

if TYPE_CHECKING:
    from crosscoder.crosscoder import Crosscoder


@torch.no_grad()
def fold(crosscoder: Crosscoder) -> Crosscoder:
    """The same function on raw activations, for inference."""
    if crosscoder.folded_normaliser:
        return deepcopy(crosscoder)
    folded = deepcopy(crosscoder)
    untied = crosscoder.wiring.untied()
    folded.bias.div_(crosscoder.scale_columns(crosscoder.writes))
    folded.bias.add_(crosscoder.mean_columns(crosscoder.writes))
    for weights, layout in zip(folded.weights, crosscoder.layouts, strict=True):
        _fold_group(crosscoder, folded, weights, layout)
    folded.wiring = untied
    folded.layouts = [GroupLayout(group, untied) for group in untied]
    folded.folded_normaliser = True
    return folded.eval()


def _fold_group(crosscoder: Crosscoder, folded: Crosscoder, weights: GroupWeights, layout: GroupLayout) -> None:
    scale_r = layout.read(crosscoder.scale_columns(crosscoder.reads))
    mean_r = layout.read(crosscoder.mean_columns(crosscoder.reads))
    scale_w = crosscoder.scale_columns(crosscoder.writes)
    weights.encoder.mul_(scale_r)
    weights.encoder_bias.sub_(weights.encoder @ mean_r)
    weights.decoder = nn.Parameter(layout.expanded(weights.decoder) / layout.written(scale_w))
    if weights.skip is not None and layout.skip_written is not None:
        weights.skip.mul_(scale_r).div_(layout.skip_written(scale_w)[:, None])
        layout.skip_written.add_to(folded.bias, -(weights.skip @ mean_r))
