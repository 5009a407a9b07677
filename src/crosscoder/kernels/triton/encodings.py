"""Selections on a CUDA device over the encodings that every backend is given.

A proposing product of the whole batch is made and kept until its selection is done. BatchTopK's cut stays on the
device; whether a selection could be shown to be exact is counted there, for the host to read when it likes
(`Cut.doubtful`). The others ask at once, and select again from full precision if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from crosscoder.codes import SparseCode
from crosscoder.kernels.candidates import Encoding
from crosscoder.kernels.cuts import Cut
from crosscoder.kernels.triton import selection
from crosscoder.kernels.triton.candidates import GroupScores
from crosscoder.kernels.triton.selection import Selection


def batch_top_k(encodings: Sequence[Encoding], k: int, cut: Cut) -> list[SparseCode]:
    """The k·rows largest positive scores of all groups together, one padded code per group; nobody waits."""
    groups = [_scores(encoding) for encoding in encodings]
    k_total = min(k * groups[0].num_rows, sum(group.pre.numel() for group in groups))
    low = selection.estimated_cut(groups, k_total=k_total) if cut.on_device is None else cut.on_device
    found = selection.batch_top_k(groups, k_total=k_total, cut=low)
    cut.on_device = found.next_cut
    broken = found.broken.long()
    cut.doubtful = broken if cut.doubtful is None else cut.doubtful + broken
    return [SparseCode.of(part.pattern, part.values) for part in found.groups]


def top_k(encodings: Sequence[Encoding], k: int, cut: Cut) -> list[SparseCode]:
    """The k largest positive scores of every row among all groups together; the host waits to know that it is so."""
    k = min(k, sum(encoding.num_latents for encoding in encodings))
    return _surely(encodings, partial(selection.top_k, k=k))


def above_threshold(encodings: Sequence[Encoding], thresholds: Sequence[Tensor], cut: Cut) -> list[SparseCode]:
    """Every pair whose score is above its latent's threshold; the host waits for their number."""
    return _surely(encodings, partial(selection.above_threshold, thresholds=thresholds))


def _surely(encodings: Sequence[Encoding], select: Callable[[Sequence[GroupScores]], Selection]) -> list[SparseCode]:
    """An exact selection, from products in full precision if proposals leave it in doubt; without padding."""
    found = select([_scores(encoding) for encoding in encodings])
    if bool(found.broken):
        found = select([_scores(replace(encoding, proposer=None)) for encoding in encodings])
    return [SparseCode.of(part.pattern, part.values).active() for part in found.groups]


def _scores(encoding: Encoding) -> GroupScores:
    encoder, bias, x = encoding.encoder.detach(), encoding.bias.detach(), encoding.x.detach()
    if encoding.proposer is None:
        pre = torch.addmm(bias, x, encoder.T)
    else:
        pre = torch.addmm(bias.to(torch.bfloat16), encoding.rounded_x, encoding.proposer.T)
    return GroupScores(pre, encoding.gate, x, encoder, bias)
