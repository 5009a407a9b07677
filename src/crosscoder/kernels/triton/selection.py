"""Exact selection on the device: the largest fp32 scores among candidates that a bf16 product proposes.

    BatchTopK   T = the k_total-th largest positive score of the batch (0 if there are fewer): everything above T is
                kept, and of what equals T the first in the order of rows, groups, latents, up to k_total in all
    TopK        the same in every row, with k
    threshold   every score above its latent's own threshold

With e the largest error of a proposal near the cut c, as the candidates show it (`candidates.py`), no pair that is no
candidate has a score above c + 2e, the factor two being for what was not seen. So the result is exact if T > c + 2e.
If it is not, a second round runs on the stored proposals with a lower cut: T − 4e when there were enough candidates,
otherwise the level that a count over 128 levels finds for 1.4 k_total. That round's kernels leave at once when there is
no need for it, so that the host never has to know. Only if that round fails too, `broken` is set, for the host to read
when it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoder.kernels.triton.candidates import ROUNDING, Buffers, GroupScores, Scored, candidates, refined
from crosscoder.kernels.triton.compaction import Compaction, count, count_levels, fill
from crosscoder.kernels.triton.keeping import keep_of_batch, keep_of_rows, keep_where
from crosscoder.kernels.triton.patterns import PaddedPattern, Selected

ROOM = 2
"""Candidates that there is room for, as a multiple of what is kept."""
SAMPLE_ROWS = 16
OVERSHOOT = 1.3
LEVELS = 128
LEVEL_STEP = 2.0 ** (-1 / 12)
WANTED = 1.4


@dataclass(frozen=True)
class Selection:
    """The active pairs of every group, the thresholds of their scores, and what the next batch can start from."""

    groups: tuple[Selected, ...]
    threshold: Float[Tensor, "*rows"]
    """T, of the batch or of every row; 0 where everything positive was kept."""
    next_cut: Float[Tensor, ""]
    """A cut for the next batch: below T by 4 %, and by three times the error seen."""
    broken: Bool[Tensor, ""]
    """Whether exactness could not be shown; the pairs are then those of the proposals' largest scores at best."""


@dataclass(frozen=True)
class _Round:
    found: tuple[Scored, ...]
    threshold: Tensor
    error: Tensor
    overflow: Tensor
    cut: Tensor

    @property
    def exact(self) -> Tensor:
        """Whether no pair below the cut can belong to the result."""
        reach = self.cut + 2 * self.error
        return ~self.overflow & torch.where(self.threshold > 0, self.threshold > reach, reach <= 0)


def batch_top_k(groups: Sequence[GroupScores], *, k_total: int, cut: Float[Tensor, ""]) -> Selection:
    """The `k_total` largest positive scores of all groups and rows together; ties to the lowest row, group, latent.

    `cut` is a score, fp32 on the device, somewhat below the expected threshold: the last step's `next_cut`, or
    `estimated_cut`. It decides what the selection costs, not what it is. Every group's pattern has the capacity
    `k_total`. No host synchronisation.
    """
    buffers = [Buffers.empty(group, ROOM * k_total + LEVELS) for group in groups]
    always = groups[0].pre.new_ones(1, dtype=torch.int32)
    first = _round(groups, buffers, k_total=k_total, cut=cut, run=always)
    again = (~first.exact).to(torch.int32).view(1)
    wider = torch.where(first.exact, cut, _wider(groups, first, k_total=k_total, run=again))
    last = _round(groups, buffers, k_total=k_total, cut=wider, run=again)
    kept = keep_of_batch(last.found, threshold=last.threshold, budget=k_total, capacity=k_total)
    return Selection(kept, last.threshold, _next_cut(last), ~last.exact)


def top_k(groups: Sequence[GroupScores], *, k: int) -> Selection:
    """The `k` largest positive scores of every row over all groups; ties to the lowest group, then latent.

    Candidates are each row's k + max(32, k / 2) largest proposals of every group; `broken` tells if that was too few
    to be sure. `next_cut` has no use here. No host synchronisation.
    """
    found = [_row_candidates(group, k + max(32, k // 2)) for group in groups]
    rows = groups[0].num_rows
    scores = torch.cat([part.scores.view(rows, -1) for part in found], dim=1)
    if scores.shape[1] >= k:
        thresholds = scores.topk(k, dim=1, sorted=False).values.amin(1).clamp(min=0)
    else:
        thresholds = scores.new_zeros(rows)
    broken = torch.stack([_unsure(part, group, thresholds) for part, group in zip(found, groups, strict=True)]).any()
    kept = keep_of_rows(found, thresholds=thresholds, budget=k, capacity=k * rows)
    return Selection(kept, thresholds, thresholds.amin(), broken)


def above_threshold(groups: Sequence[GroupScores], *, thresholds: Sequence[Float[Tensor, "_"]]) -> Selection:
    """Every pair whose score exceeds its latent's threshold (one vector a group), as at inference.

    The number of candidates is read by the host, once, to give the patterns their capacity: the only synchronisation.
    """
    cuts = [_below(group, threshold) for group, threshold in zip(groups, thresholds, strict=True)]
    counted = [_counted(group, cut) for group, cut in zip(groups, cuts, strict=True)]
    capacities: list[int] = torch.stack([pairs.counts.sum() for pairs in counted]).tolist()
    kept: list[Selected] = []
    unsure: list[Tensor] = []
    for i, (group, threshold) in enumerate(zip(groups, thresholds, strict=True)):
        part = _filled(group, cuts[i], Compaction(counted[i].counts, _zeros(capacities[i], group), len(group.gate)))
        of_pair = part.pattern.latents
        kept.append(keep_where(part, part.scores > threshold[of_pair], capacity=capacities[i]))
        error = part.errors_near(cuts[i][of_pair]) + ROUNDING * cuts[i].abs()[of_pair]
        unsure.append((2 * error > (threshold - cuts[i])[of_pair]).any())
    lowest = torch.stack([threshold.amin() for threshold in thresholds]).amin()
    return Selection(tuple(kept), lowest, lowest, torch.stack(unsure).any())


def estimated_cut(groups: Sequence[GroupScores], *, k_total: int) -> Float[Tensor, ""]:
    """A cut from the proposals of 16 rows, for a first batch; on the device, without a synchronisation."""
    rows = groups[0].num_rows
    step = max(1, rows // SAMPLE_ROWS)
    sample = torch.cat([(group.pre[::step].float() * group.gate).flatten() for group in groups])
    wanted = int(OVERSHOOT * k_total * len(range(0, rows, step)) / rows) + 1
    return sample.topk(min(wanted, len(sample)), sorted=False).values.amin().clamp(min=0)


def _round(
    groups: Sequence[GroupScores], buffers: Sequence[Buffers], *, k_total: int, cut: Tensor, run: Tensor
) -> _Round:
    found = tuple(
        candidates(group, group.latent_cut(cut), into=into, run=run)
        for group, into in zip(groups, buffers, strict=True)
    )
    scores = torch.cat([part.scores for part in found])
    if len(scores) >= k_total:
        threshold = scores.topk(k_total, sorted=False).values.amin().clamp(min=0)
    else:
        threshold = scores.new_zeros(())
    error = torch.stack([part.errors_near(cut).amax() for part in found]).amax()
    overflow = torch.stack([into.overflow for into in buffers]).any()
    return _Round(found, threshold, error + ROUNDING * cut.abs(), overflow, cut)


def _wider(groups: Sequence[GroupScores], failed: _Round, *, k_total: int, run: Tensor) -> Tensor:
    """The cut of the second round."""
    highest = torch.stack([part.scores.amax() for part in failed.found]).amax()
    steps = torch.arange(LEVELS, device=run.device)
    levels = 2 * torch.maximum(highest, failed.cut.abs()) * LEVEL_STEP**steps
    counts = torch.stack([count_levels(group.pre, group.gate, levels=levels, run=run) for group in groups]).sum(0)
    chosen = (counts < WANTED * k_total).sum().view(1)
    negative = -4 * failed.error  # every pair that could be positive
    counted = torch.cat([levels, negative.view(1)]).gather(0, chosen).view(())
    enough = (failed.threshold > 0) & ~failed.overflow
    return torch.where(enough, failed.threshold - 4 * failed.error, counted)


def _next_cut(last: _Round) -> Tensor:
    margin = torch.maximum(0.04 * last.threshold, 3 * last.error)
    return torch.where(last.threshold > 0, last.threshold - margin, -4 * last.error)


def _row_candidates(group: GroupScores, count: int) -> Scored:
    """The `count` largest proposals of every row, by latent."""
    rows, latents = group.pre.shape
    picked = torch.cat([_largest(part, group.gate, min(count, latents)) for part in group.pre.split(512)])
    pointers = torch.arange(rows + 1, device=picked.device) * picked.shape[1]
    pattern = PaddedPattern(pointers, picked.flatten(), latents)
    products = torch.zeros(picked.numel(), device=picked.device)
    return refined(group, pattern, into=products, limit=pointers[-1:])


def _largest(pre: Tensor, gate: Tensor, count: int) -> Tensor:
    return (pre.float() * gate).topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def _unsure(found: Scored, group: GroupScores, thresholds: Tensor) -> Tensor:
    """Whether a pair that was no candidate could belong to the result of its row."""
    shape = (group.num_rows, -1)
    cut = found.approximate.view(shape).amin(1)
    reach = cut + 2 * (found.errors.view(shape).amax(1) + ROUNDING * cut.abs())
    missing = found.approximate.view(shape).shape[1] < group.pre.shape[1]
    safe = torch.where(thresholds > 0, thresholds > reach, reach <= 0)
    return ~safe.all() if missing else torch.zeros_like(safe.any())


def _below(group: GroupScores, threshold: Tensor) -> Tensor:
    """Cuts that lie below the thresholds by more than the proposals are likely to be off.

    A product of rounded factors is off by about `2⁻⁹ sqrt(Σ_d x_d² e_d²)`, of which twelve times stands for rows longer
    than the mean, and twice that for what is not seen.
    """
    power = group.x.square().mean(0)
    products = torch.cat([part.square() @ power for part in group.encoder.split(4096)]).sqrt()
    off = 24 * 2.0**-9 * products + 4 * ROUNDING * group.bias.abs()
    return threshold - 4 * ROUNDING * threshold.abs() - off * group.gate


def _counted(group: GroupScores, cut: Tensor) -> Compaction:
    pairs = Compaction.empty(group.pre, 0)
    count(group.pre, group.latent_cut(cut), into=pairs)
    return pairs


def _filled(group: GroupScores, cut: Tensor, pairs: Compaction) -> Scored:
    pattern = fill(group.pre, group.latent_cut(cut), into=pairs)
    products = torch.zeros(pairs.latents.shape[0], device=group.pre.device)
    return refined(group, pattern, into=products, limit=pattern.row_pointers[-1:])


def _zeros(capacity: int, group: GroupScores) -> Tensor:
    return torch.zeros(capacity, dtype=torch.int64, device=group.pre.device)
