"""Checks of the kernels alone, for which the trainer's packages are not needed: every operation, selection and update
on edge cases, and elements past 2³¹.
"""

from __future__ import annotations

from collections.abc import Iterator

import gpu_edges
import torch
from gpu_lines import Line
from torch import Tensor

from crosscoder.kernels.triton import compaction, operations
from crosscoder.kernels.triton.adam import adam, scalars
from crosscoder.kernels.triton.candidates import GroupScores
from crosscoder.kernels.triton.patterns import PaddedPattern
from crosscoder.kernels.triton.selection import batch_top_k, top_k


def edges(device: str) -> Iterator[Line]:
    """Every operation on every edge case."""
    shapes = gpu_edges.SHAPES[:2] if device == "cpu" else gpu_edges.SHAPES
    for name, width, dtype in shapes:
        found = list(gpu_edges.outcomes(gpu_edges.case(name, width, dtype, device=device)))
        bad = [outcome for outcome in found if not outcome.good]
        worst = max(outcome.error for outcome in found)
        what = f"edge case {name}, {width} wide, {str(dtype)[6:]}"
        yield Line(what, not bad, f"error {worst:.1e}" + "".join(f"; {outcome}" for outcome in bad))


def selections(device: str) -> Iterator[Line]:
    """Exact sets from any cut, ties, few positive scores, one pair, rows."""
    for shift in (0.0,) if device == "cpu" else (0.0, -9.0, -2.0):
        group = scores(device, shift=shift)
        for k_total in (1, 60):
            for cut in (0.0, 1.9, 30.0):
                found = batch_top_k([group], k_total=k_total, cut=torch.full((), cut, device=device))
                same = torch.equal(mask_of(found.groups[0].pattern, group), largest(group, k_total))
                what = f"{k_total} largest scores, shift {shift}, cut {cut}"
                yield Line(what, same and not bool(found.broken), f"threshold {float(found.threshold):.4f}")
    group = scores(device)
    found = top_k([group], k=5)
    rows = torch.stack([largest_of(row, 5) for row in exact(group)])
    same = torch.equal(mask_of(found.groups[0].pattern, group), rows)
    yield Line("5 largest scores of every row", same and not bool(found.broken), f"{int(rows.sum())} pairs")
    tied = GroupScores(*(t.to(device) for t in tied_tensors()))
    found = batch_top_k([tied], k_total=5, cut=torch.full((), 1.5, device=device))
    listed = found.groups[0].pattern.latents.tolist()
    yield Line("ties go to the lowest position", listed == [0, 1, 2, 0, 2], str(listed))


def scores(device: str, *, shift: float = 0.0) -> GroupScores:
    """Random scores of 23 rows and 300 latents, strided."""
    g = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(23, 29, generator=g)[:, 5:], torch.randn(300, 24, generator=g) / 24**0.5
    bias, gate = 0.1 * torch.randn(300, generator=g) + shift, torch.rand(300, generator=g) + 0.5
    x, encoder, bias, gate = (t.to(device) for t in (x, encoder, bias, gate))
    pre = torch.empty(23, 307, dtype=torch.bfloat16, device=device)[:, 3:303]
    pre.copy_(torch.addmm(bias.bfloat16(), x.bfloat16(), encoder.bfloat16().T))
    return GroupScores(pre, gate, x, encoder, bias)


def tied_tensors() -> tuple[Tensor, ...]:
    """Scores 4 2 2 | 3 0 2 | 2 2 1, of which the five largest end in a tie."""
    pre = torch.tensor([[4.0, 2.0, 2.0], [3.0, 0.0, 2.0], [2.0, 2.0, 1.0]])
    return pre.bfloat16(), torch.ones(3), pre, torch.eye(3), torch.zeros(3)


def exact(group: GroupScores) -> Tensor:
    """Scores in fp64, rounded once."""
    return ((group.x.double() @ group.encoder.double().T + group.bias) * group.gate).float()


def largest(group: GroupScores, count: int) -> Tensor:
    """The mask of the largest positive scores."""
    return largest_of(exact(group).flatten(), count).view_as(group.pre)


def largest_of(flat: Tensor, count: int) -> Tensor:
    """The mask of the largest positive entries of a vector."""
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count).indices] = True
    return mask & (flat > 0)


def mask_of(pattern: PaddedPattern, group: GroupScores) -> Tensor:
    """The selected pairs as a mask."""
    mask = torch.zeros(group.pre.shape, dtype=torch.bool, device=group.pre.device)
    mask[pattern.row_ids[pattern.valid], pattern.latents[pattern.valid]] = True
    return mask


def updates(device: str) -> Iterator[Line]:
    """One pass of Adam over rows of several stretches against fp64, with what it writes beside; and none for NaN."""
    for widths in ((13, 20), (16,), (1,)) if device == "cpu" else ((13, 20), (16,), (1,), (2304, 2304), (1500, 80, 3)):
        g = torch.Generator().manual_seed(sum(widths))
        w, gradient, m, v = torch.randn(4, 37, sum(widths), generator=g).to(device)
        yield update((w, gradient, m, v.square()), widths, norm=gradient.norm())
        yield update((w, gradient, m, v.square()), widths, norm=torch.full_like(w[0, 0], torch.nan))


def update(tensors: tuple[Tensor, ...], widths: tuple[int, ...], *, norm: Tensor) -> Line:
    """The eighth update of weights, from a gradient and moments."""
    new, gradient, m, v = (tensor.clone() for tensor in tensors)
    count, copy = torch.full((), 7, device=norm.device), torch.zeros_like(new, dtype=torch.bfloat16)
    packed = scalars(count, norm=norm, max_norm=1.0, learning_rate=1e-2)
    squares = adam(new, gradient, exp_avg=m, exp_avg_sq=v, scalars=packed, copy=copy, widths=widths)
    assert squares is not None, "widths were given"
    taken = bool(norm.isfinite())
    off = float((new - updated(*tensors, norm=norm) if taken else new - tensors[0]).abs().max())
    parts = new.double().split(list(widths), dim=1)
    apart = float((squares - torch.stack([part.square().sum(1) for part in parts], dim=1)).abs().max())
    good = off <= 1e-6 * taken and apart <= 1e-4 * max(widths) ** 0.5 and torch.equal(copy, new.bfloat16())
    what = f"an update of rows of {' + '.join(map(str, widths))}, the norm {'finite' if taken else 'NaN'}"
    return Line(what, good and int(count) == 7 + taken, f"error {off:.1e}, of squared norms {apart:.1e}")


def updated(w: Tensor, gradient: Tensor, m: Tensor, v: Tensor, *, norm: Tensor) -> Tensor:
    """What that update gives, in fp64."""
    clipped = gradient.double() / ((norm.double() + 1e-6) / 1.0).clamp(min=1)
    m, v = 0.9 * m.double() + 0.1 * clipped, 0.999 * v.double() + 0.001 * clipped**2
    return w - 1e-2 * (m / (1 - 0.9**8)) / ((v / (1 - 0.999**8)).sqrt() + 1e-8)


def far(device: str) -> Iterator[Line]:
    """Scores and tables whose last offsets need more than 32 bits."""
    rows, latents, width = (3, 70, 16) if device == "cpu" else (2**15, 73728, 4608)
    pre = torch.zeros(rows, latents, dtype=torch.bfloat16, device=device)
    pre[rows - 1, latents - 2], pre[1, 3] = 5.0, 5.0
    into = compaction.Compaction.empty(pre, 10)
    pattern = compaction.compact(pre, torch.ones(latents, device=device), into=into)
    found = (pattern.row_ids[:2].tolist(), pattern.latents[:2].tolist())
    yield Line(f"compaction of {pre.numel():.1e} scores", found == ([1, rows - 1], [3, latents - 2]), str(found))
    del pre
    latents = 2**31 // width + 10_000 if device == "cuda" else 50
    table = torch.zeros(latents, width, device=device)
    table[-1] = 2.0
    pointers, listed = torch.tensor([0, 1], device=device), torch.tensor([latents - 1], device=device)
    one = PaddedPattern(pointers, listed, latents)
    got = operations.sum_by_row(one, torch.ones(1, device=device), table)
    products = operations.pair_products(one, got, table)
    yield Line(f"a table of {table.numel():.1e}", bool((got == 2).all()) and float(products) == 4 * width, "")
    del table
    sums = operations.sum_by_latent(one, torch.ones(1, device=device), got)
    right = bool((sums[-1] == 2).all()) and int(sums[: latents - 1].count_nonzero()) == 0
    yield Line(f"sums of {sums.numel():.1e}", right, "")
