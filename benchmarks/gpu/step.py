"""Our training step beside two others on a GPU, at the size of Gemma-2-2B.

    python benchmarks/gpu/step.py --out results                      # two sources of 2,304, 73,728 latents, k = 100
    TRITON_INTERPRET=1 python benchmarks/gpu/step.py --interpret     # the same code on the CPU, at a tiny size

Contenders (`gpu_contenders.py`) start from the same weights, trained by our step, and take turns, batch by batch, on
the same distinct batches; times are medians of events over 20 steps. The floor is what one encoder product and the
least memory traffic would take at the rates that this device was measured at, in the same run.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gpu_device
import torch
from gpu_contenders import DenseStep, TextbookStep
from gpu_device import Ceilings
from gpu_worlds import GEMMA, TINY, Size, World

FORMAT = "crosscoder.gpu_step/1"
Step = Callable[..., object]


@dataclass(frozen=True)
class Result:
    """One contender at one number of rows."""

    contender: str
    rows: int
    milliseconds: float
    fastest: float
    slowest: float
    rows_per_second: float
    peak_gigabytes: float
    phases: dict[str, float]


class Watch:
    """Times the phases of a step, by events on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self("")

    def __call__(self, name: str) -> None:
        """End a phase."""
        if self._device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def phases(self) -> dict[str, float]:
        """Milliseconds of every phase."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return {name: self._between(start, stop) for (_, start), (name, stop) in pairs}

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) if self._device == "cuda" else (stop - start) * 1e3


def main() -> None:
    """Measure and report."""
    options = gpu_device.arguments(__doc__)
    device = gpu_device.device(options)
    if device is None:
        return
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    sizes = [TINY] if device == "cpu" else [GEMMA, replace(GEMMA, rows=2 * GEMMA.rows)]
    ceilings = Ceilings(1e9, 1e9) if device == "cpu" else gpu_device.ceilings()
    print(gpu_device.described(device), ceilings, sep="\n", flush=True)
    results: list[Result] = []
    for size in sizes:
        results += race(size, device, steps=1 if device == "cpu" else 20)
        print(table(size, [r for r in results if r.rows == size.rows], ceilings), flush=True)
    if options.out is not None:
        write(sizes, results, ceilings, device, options.out)


def race(size: Size, device: str, *, steps: int) -> list[Result]:
    """Every contender's times at one size, in turns."""
    world = World(size, device=device)
    contenders, peaks = start(world, device, warm=1 if device == "cpu" else 200)
    watches: dict[str, list[Watch]] = {name: [] for name in contenders}
    for turn in range(steps):
        x = world.rows()
        order = list(contenders) if turn % 2 else list(contenders)[::-1]
        for name in order:
            watches[name].append(Watch(device))
            contenders[name](x, watches[name][-1])
    times = {name: [watch.phases() for watch in own] for name, own in watches.items()}
    return [result(name, size.rows, times[name], peaks[name]) for name in contenders]


def start(world: World, device: str, *, warm: int) -> tuple[dict[str, Step], dict[str, float]]:
    """The contenders with the weights that our step has after `warm` steps, and what each of them holds at most."""
    size, before = world.size, allocated(device)
    ours = world.step()
    for _ in range(warm):
        ours(world.rows())
    ours.learning_rate = 1e-4
    contenders: dict[str, Step] = {"ours": ours}
    peaks = {"ours": peak(lambda: ours(world.rows()), device, held=before)}
    for name, kind in (("dense bf16", DenseStep), ("textbook sparse", TextbookStep)):
        before = allocated(device)
        encoder, decoder = ours.weights["encoder"].clone(), ours.weights["decoder"].clone()
        step = kind(encoder, decoder, widths=size.widths, k=size.k)
        try:
            for _ in range(1 if device == "cpu" else 5):
                step(world.rows())
            peaks[name] = peak(lambda step=step: step(world.rows()), device, held=before)
        except (RuntimeError, TypeError) as error:  # the others are measured all the same
            print(f"{name} is left out at {size.rows} rows: {error}", flush=True)
            continue
        contenders[name] = step
    return contenders, peaks


def allocated(device: str) -> float:
    """Bytes held on the GPU now."""
    gc.collect()
    return float(torch.cuda.memory_allocated()) if device == "cuda" else 0.0


def peak(step: Callable[[], object], device: str, *, held: float) -> float:
    """The most gigabytes held during two steps, without what was held before by others."""
    if device == "cpu":
        step()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    return (torch.cuda.max_memory_allocated() - held) / 1e9


def result(name: str, rows: int, times: list[dict[str, float]], held: float) -> Result:
    """Medians of whole steps and of phases."""
    whole = [sum(phases.values()) for phases in times]
    phases = {phase: statistics.median(t[phase] for t in times) for phase in times[0]}
    middle = statistics.median(whole)
    return Result(name, rows, middle, min(whole), max(whole), rows / middle * 1e3, held, phases)


def floor(size: Size, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds that the parts cannot do without, at the measured rates."""
    d, f, rows, pairs = size.width, size.num_latents, size.rows, size.rows * size.k
    traffic = {
        "scores, written and read once": 2 * 2 * rows * f,
        "refinement: an encoder row per pair": 4 * pairs * d,
        "decode: a decoder row per pair": 4 * pairs * d,
        "weight gradients: a row per pair, twice, and both written": 2 * 4 * pairs * d + 2 * 4 * f * d,
        "gradient norm": 2 * 4 * f * d,
        "optimiser: 28 bytes a weight, 2 for the copy": (2 * 28 + 2) * f * d,
    }
    product = {"encoder product": 2 * rows * d * f / ceilings.product * 1e3}
    return product | {name: count / ceilings.copy * 1e3 for name, count in traffic.items()}


def table(size: Size, results: list[Result], ceilings: Ceilings) -> str:
    """One size as Markdown."""
    ours, least = results[0].milliseconds, sum(floor(size, ceilings).values())
    lines = [
        f"## {size.rows} rows, {size.width} wide, {size.num_latents} latents, k = {size.k}",
        "",
        "| step | ms (fastest – slowest) | rows / s | peak GB | times ours | share of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        span = f"{r.milliseconds:.2f} ({r.fastest:.2f} – {r.slowest:.2f})"
        share = f"{least / r.milliseconds:.0%}"
        ratio = f"{r.milliseconds / ours:.2f}"
        lines.append(
            f"| {r.contender} | {span} | {r.rows_per_second:,.0f} | {r.peak_gigabytes:.1f} | {ratio} | {share} |"
        )
    lines += ["", "| phase | ms |", "|---|---|"]
    lines += [f"| {r.contender}: {name} | {taken:.3f} |" for r in results for name, taken in r.phases.items()]
    lines += ["", f"| floor ({least:.2f} ms in all) | ms |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {taken:.3f} |" for name, taken in floor(size, ceilings).items()]) + "\n"


def write(sizes: list[Size], results: list[Result], ceilings: Ceilings, device: str, out: Path) -> None:
    """Everything as JSON and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT,
        "facts": asdict(gpu_device.facts(device)),
        "ceilings": asdict(ceilings),
        "results": [asdict(r) for r in results],
        "floors": [{"rows": size.rows} | floor(size, ceilings) for size in sizes],
    }
    (out / "step.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rates = f"Measured: copy {ceilings.copy / 1e12:.2f} TB/s, bf16 product {ceilings.product / 1e12:.0f} TFLOP/s."
    parts = [gpu_device.described(device), rates]
    parts += [table(size, [r for r in results if r.rows == size.rows], ceilings) for size in sizes]
    (out / "step.md").write_text("\n\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
