"""What latent scaling costs beside encoding and decoding the same rows, and what it finds that norms miss.

The cost is of one pass that encodes, decodes and keeps the sums, beside `encode` and `decode` alone, in one process, in
turn on the same rows: medians of the ratios of each round. Rows and weights are those of the step benchmark's worlds,
256 rows to a document; intervals are of 100 draws. The toy has narrow exclusive concepts (`scaling_toy`).

    python benchmarks/scaling.py                        # the cost: demo's size, and two larger ones; some minutes
    python benchmarks/scaling.py --toy                  # the toy: eight seeds, some minutes of one core
    python benchmarks/scaling.py --report-only          # the report of what is there
    python benchmarks/scaling.py --quick --out runs/q   # smallest sizes, one seed: shows that it runs
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from encode import trained
from scaling_report import write
from scaling_toy import toy
from step_data import World
from step_sizes import SIZES, SMALLEST, Size

import crosscoder
from crosscoder.activations import Batch, Rows
from crosscoder.analysis import Bootstrap, ScalingSums
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK
from crosscoder.training.json_numbers import json_text
from crosscoder.training.validation import Reconstructor

DEMO = Size("demo", 2, 256, 4096, 4096, 38, training_steps=100)
"""The demo's crosscoder: 4,096 latents on two sources of 256."""
CHOICES = {
    size.name: size
    for size in (DEMO, replace(SIZES["A"], training_steps=30), replace(SIZES["B"], training_steps=10), SMALLEST)
}
CONTEXT = 256
ONE, BOTH = "one pair", "both directions"


def main() -> None:
    """Measure what was asked for, then report."""
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        name, measured = ("toy", toy(options)) if options.toy else ("cost", cost(options))
        result = {"format": f"crosscoder.scaling-{name}/1", "about": about(options), name: measured}
        (options.out / f"{name}.json").write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    found = {
        n: json.loads((options.out / f"{n}.json").read_text())
        for n in ("cost", "toy")
        if (options.out / f"{n}.json").exists()
    }
    print(write(found, options.out / "scaling.md"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The cost of latent scaling, and what it finds.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling"), help="directory of the results")
    parser.add_argument("--toy", action="store_true", help="the toy in place of the cost")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of the toy")
    parser.add_argument("--size", nargs="+", default=["demo", "A", "B"], choices=sorted(CHOICES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one seed")
    return parser.parse_args()


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ratios at every size."""
    measured: list[dict[str, Any]] = []
    for size in (CHOICES[name] for name in (["smallest"] if options.quick else options.size)):
        world = World(size)
        cc = trained(size, BatchTopK(size.k), world, steps=max(4, size.training_steps))
        cc.calibrate([world.batch(20_000 + i) for i in range(2)])  # on rows not trained on, so that L0 is k
        measured.append(race(cc, size, world, options.rounds))
        print(json_text(measured[-1], indent=None), flush=True)
    return measured


@torch.no_grad()
def race(cc: Crosscoder, size: Size, world: World, rounds: int) -> dict[str, Any]:
    """Milliseconds per batch of every contender, one turn each per round, and their ratios to encode + decode."""
    x = world.batch(10_000)
    context = torch.arange(len(x)) // CONTEXT
    batch = Batch(x, Rows(context, torch.arange(len(x)) % CONTEXT, torch.zeros(len(x), dtype=torch.int8)))
    contenders: dict[str, Callable[[], object]] = {"encode + decode": lambda: cc.decode(cc.encode(x))}
    a, b = cc.writes.keys[:2]
    for name, pairs in {ONE: [(a, b)], BOTH: [(a, b), (b, a)]}.items():
        for suffix, bootstrap in {"": None, ", intervals": Bootstrap()}.items():
            contenders[name + suffix] = _scaled(cc, batch, ScalingSums(cc, pairs, bootstrap=bootstrap))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    base = times["encode + decode"]
    ratios = {name: median(t / s for t, s in zip(own, base, strict=True)) for name, own in times.items()}
    return {
        "size": size.name,
        "shape": size.shape,
        "l0": cc.encode(x).l0,
        "milliseconds": {name: median(own) for name, own in times.items()},
        "ratios": ratios,
    }


def _scaled(cc: Crosscoder, batch: Batch, sums: ScalingSums) -> Callable[[], object]:
    reconstruct = Reconstructor(cc)
    return lambda: sums.update(batch, reconstruct(batch.x))


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What made these numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} thread(s)",
        "quick": options.quick,
    }


if __name__ == "__main__":
    main()
