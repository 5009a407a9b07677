"""Are the kernels right on this GPU? Every check prints a line; the exit code is 1 if one failed.

    python benchmarks/gpu/check.py                                   # on a CUDA device, a few minutes
    TRITON_INTERPRET=1 python benchmarks/gpu/check.py --interpret    # the same checks on the CPU, at a tiny size

Edge cases of every operation and of the selection; a trained step against dense fp64; a step at the size of Gemma-2-2B
against fp64 on some rows and latents; two runs bit for bit; no synchronisation; more than 2³¹ elements.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu_device
import gpu_edges
import torch
from gpu_exactness import Comparison, against_dense, on_samples
from gpu_sparse_step import SparseStep
from gpu_worlds import GEMMA, SMALL, TINY, Size, World
from torch import Tensor

from crosscoder.kernels.triton import compaction, operations
from crosscoder.kernels.triton.candidates import GroupScores
from crosscoder.kernels.triton.patterns import PaddedPattern
from crosscoder.kernels.triton.selection import batch_top_k, top_k

FORMAT = "crosscoder.gpu_check/1"


@dataclass(frozen=True)
class Line:
    """One check: what was looked at, whether it holds, and the number that says so."""

    what: str
    holds: bool
    seen: str


def main() -> None:
    """Run every check and say what came of it."""
    options = gpu_device.arguments(__doc__)
    device = gpu_device.device(options)
    if device is None:
        return
    print(gpu_device.described(device))
    lines: list[Line] = []
    for line in checks(device):
        print(f"{'ok  ' if line.holds else 'FAIL'}  {line.what}: {line.seen}", flush=True)
        lines.append(line)
    if options.out is not None:
        write(lines, device, options.out)
    failed = sum(not line.holds for line in lines)
    print(f"{len(lines) - failed} of {len(lines)} checks hold.")
    sys.exit(failed > 0)


def checks(device: str) -> Iterator[Line]:
    """Every check in turn; one that cannot be made is one that does not hold."""
    dry = device == "cpu"
    small, large = (TINY, TINY) if dry else (SMALL, GEMMA)
    parts: list[tuple[str, Callable[[], Iterator[Line]]]] = [
        ("edge cases", lambda: edges(device)),
        ("selection", lambda: selections(device)),
        ("dense fp64", lambda: dense(small, device, steps=2 if dry else 200)),
        ("bit for bit", lambda: repeats(small, device)),
        ("synchronisation", lambda: unsynchronised(small, device)),
        ("Gemma-2-2B", lambda: sampled(large, device, steps=1 if dry else 200)),
        ("more than 2^31 elements", lambda: far(device)),
    ]
    for name, part in parts:
        try:
            yield from part()
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            yield Line(name, False, f"{type(error).__name__}: {str(error)[:300]}")
        if device == "cuda":
            torch.cuda.empty_cache()


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


def trained(size: Size, device: str, *, steps: int) -> tuple[World, SparseStep]:
    """A world and a step that has been trained on it for a while."""
    world = World(size, device=device)
    step = world.step()
    for _ in range(steps):
        step(world.rows())
    return world, step


def dense(size: Size, device: str, *, steps: int) -> Iterator[Line]:
    """A trained step of `size` against all of it in fp64."""
    world, step = trained(size, device, steps=steps)
    yield from as_lines(f"after {steps} steps, {size.num_latents} latents", against_dense(step, world.rows()))


def sampled(size: Size, device: str, *, steps: int) -> Iterator[Line]:
    """A trained step of `size` against fp64 on some rows and latents."""
    world, step = trained(size, device, steps=steps)
    yield from as_lines(f"after {steps} steps, {size.num_latents} latents", on_samples(step, world.rows()))


def as_lines(where: str, comparisons: Iterator[Comparison]) -> Iterator[Line]:
    """Comparisons as lines."""
    for one in comparisons:
        yield Line(f"{where}: {one.what}", one.value <= one.bound, f"{one.value:.2e} (at most {one.bound:.0e})")


def repeats(size: Size, device: str) -> Iterator[Line]:
    """Two runs from the same start."""
    steps = 2 if device == "cpu" else 10
    (_, one), (_, two) = (trained(size, device, steps=steps) for _ in range(2))
    same = all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    yield Line(f"two runs of {steps} steps are bit-equal", same, "all weights")


def unsynchronised(size: Size, device: str) -> Iterator[Line]:
    """Steps in which any wait for the device raises."""
    world, step = trained(size, device, steps=1 if device == "cpu" else 3)
    batches = [world.rows() for _ in range(1 if device == "cpu" else 5)]
    with refusing_to_wait() if device == "cuda" else nullcontext():
        outcomes = [step(x) for x in batches]
    broken = sum(bool(outcome.selection.broken) for outcome in outcomes)
    yield Line(f"{len(batches)} steps without a synchronisation", broken == 0, f"{broken} selections in doubt")


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within it, an operation of torch that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def write(lines: list[Line], device: str, out: Path) -> None:
    """The lines as JSON and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "facts": asdict(gpu_device.facts(device)), "checks": [asdict(line) for line in lines]}
    (out / "check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [f"| {line.what} | {'yes' if line.holds else '**no**'} | {line.seen} |" for line in lines]
    text = "\n".join([gpu_device.described(device), "", "| check | holds | seen |", "|---|---|---|", *rows, ""])
    (out / "check.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
