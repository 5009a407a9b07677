"""The trainer's step beside two others on a GPU, at the size of Gemma-2-2B.

    python benchmarks/gpu/step.py --out results                      # two sources of 2,304, 73,728 latents, k = 100
    TRITON_INTERPRET=1 python benchmarks/gpu/step.py --interpret     # the same code on the CPU, at a tiny size

"Ours" is `Trainer.step`, once as it is and once with a tenth of the latents dead, which then have AuxK. Contenders
(`gpu_contenders.py`) start from the same weights, trained by our step, and take turns, batch by batch, on the same
distinct batches; times are medians of events over 20 steps, phases those between the trainer's own parts. The floor is
what one encoder product and the least memory traffic would take at the rates that this device was measured at, in the
same run. Where what the trainer needs cannot be imported, a line says so, and there is the floor alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gpu_device
import torch
from gpu_device import Ceilings
from gpu_timing import Result
from gpu_worlds import GEMMA, TINY, Size

FORMAT = "crosscoder.gpu_step/2"


@dataclass(frozen=True)
class Report:
    """What was measured, and what was left out."""

    sizes: list[Size]
    results: list[Result]
    ceilings: Ceilings
    left_out: str | None


def main() -> None:
    """Measure and report."""
    options = gpu_device.arguments(__doc__)
    device = gpu_device.device(options)
    if device is None:
        return
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    left_out = gpu_device.missing_for_the_trainer()
    sizes = [TINY] if device == "cpu" else [GEMMA, replace(GEMMA, rows=2 * GEMMA.rows)]
    ceilings = Ceilings(1e9, 1e9) if device == "cpu" else gpu_device.ceilings()
    print(gpu_device.described(device), ceilings, *([left_out] if left_out else []), sep="\n", flush=True)
    results: list[Result] = []
    for size in sizes:
        results += [] if left_out else raced(size, device)
        print(table(size, [r for r in results if r.rows == size.rows], ceilings), flush=True)
    if options.out is not None:
        write(Report(sizes, results, ceilings, left_out), device, options.out)


def raced(size: Size, device: str) -> list[Result]:
    """Every contender at one size."""
    import gpu_race  # it brings in what bare images lack

    return gpu_race.race(size, device, steps=1 if device == "cpu" else 20)


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
    parts = floor(size, ceilings)
    least = sum(parts.values())
    lines = [f"## {size.rows} rows, {size.width} wide, {size.num_latents} latents, k = {size.k}"]
    if results:
        lines += ["", "| step | ms (fastest – slowest) | rows / s | peak GB | times ours | share of the floor | dead |"]
        lines += ["|---|---|---|---|---|---|---|", *(row(r, results[0].milliseconds, least) for r in results)]
        lines += ["", "| phase | ms |", "|---|---|"]
        lines += [f"| {r.contender}: {name} | {taken:.3f} |" for r in results for name, taken in r.phases.items()]
    lines += ["", f"| floor ({least:.2f} ms in all) | ms |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {taken:.3f} |" for name, taken in parts.items()]) + "\n"


def row(r: Result, ours: float, least: float) -> str:
    """One contender, beside our time and the floor's."""
    span = f"{r.milliseconds:.2f} ({r.fastest:.2f} – {r.slowest:.2f})"
    ratio, share = f"{r.milliseconds / ours:.2f}", f"{least / r.milliseconds:.0%}"
    return (
        f"| {r.contender} | {span} | {r.rows_per_second:,.0f} | {r.peak_gigabytes:.1f} | {ratio} | {share} | {r.dead} |"
    )


def write(report: Report, device: str, out: Path) -> None:
    """Everything as JSON and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    sizes, ceilings = report.sizes, report.ceilings
    record = {
        "format": FORMAT,
        "facts": asdict(gpu_device.facts(device)),
        "left_out": report.left_out,
        "ceilings": asdict(ceilings),
        "results": [asdict(r) for r in report.results],
        "floors": [{"rows": size.rows} | floor(size, ceilings) for size in sizes],
    }
    (out / "step.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rates = f"Measured: copy {ceilings.copy / 1e12:.2f} TB/s, bf16 product {ceilings.product / 1e12:.0f} TFLOP/s."
    parts = [gpu_device.described(device), *([report.left_out] if report.left_out else []), rates]
    parts += [table(size, [r for r in report.results if r.rows == size.rows], ceilings) for size in sizes]
    (out / "step.md").write_text("\n\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
