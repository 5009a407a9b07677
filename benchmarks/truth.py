"""Which crosscoder to trust: architecture × sparsity × world, on worlds whose truth is known.

Every cell trains one crosscoder and writes one JSON; a finished cell is not trained again, so that a run goes on where
it stopped, and several processes may share the work. Findings of the literature are registered in `truth_findings.py`
before the cells that decide them exist; the report prints the verdicts.

    python benchmarks/truth.py                          # all cells (61 minutes of one core), then the report
    python benchmarks/truth.py --share 0/2 --no-report  # every second arena and seed, for one of two processes
    python benchmarks/truth.py --report-only            # the report of the cells that are there
    python benchmarks/truth.py --tune tight narrow      # find the coefficients of penalties again, on seed 1000
    python benchmarks/truth.py --quick --out runs/q     # few rows and small sizes: shows that it runs, proves nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from truth_cells import SPARSITIES, Arena, Cell, Rows, arenas, run, tune
from truth_findings import SECOND_SEEDS
from truth_report import write

import crosscoder
from crosscoder.training.json_numbers import json_text

SEEDS = {"overcomplete": 3, "tight": 3, "undercomplete": 5, "narrow": 3, "common": 3}
NULL_SEEDS = 5
"""Cut-offs are calibrated on the first three and tested on the others."""
TUNING_SEED = 1000
PLAIN = tuple(f"plain {sparsity}" for sparsity in SPARSITIES)
MATRIX: dict[str, tuple[str, ...]] = {
    "overcomplete": ("plain l1", "plain l1x2", "plain l1x3", "plain batchtopk"),
    "tight": (
        *PLAIN,
        "plain l1x2",
        "plain l1x3",
        "designated l1",
        "designated l1x2",
        "designated l1x3",
        "designated batchtopk",
        "designated-norm l1",
        "dedicated l1",
        "dedicated batchtopk",
        "difference batchtopk",
        "plain batchtopk independent",
        "plain l1 independent",
    ),
    "undercomplete": (
        *PLAIN,
        "designated batchtopk",
        "designated-norm batchtopk",
        "dedicated batchtopk",
        "plain batchtopk independent",
    ),
    "narrow": (*PLAIN, "dedicated batchtopk", "difference batchtopk", "plain batchtopk independent"),
    "null": (
        *PLAIN,
        "designated batchtopk",
        "dedicated batchtopk",
        "plain batchtopk independent",
        "plain l1 independent",
    ),
}
"""Architecture, sparsity (x and a factor on its coefficient), initialisation across sources where it is not `same`."""
MATRIX["common"] = MATRIX["narrow"]
SECOND_ROUND = {"overcomplete": ("plain l1", "plain batchtopk"), "narrow": ("plain batchtopk",)}
"""Cells of fresh seeds for findings that the first round left open."""


def main() -> None:
    """Train what is missing, then report."""
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: arena.shrunk() if options.quick else arena for name, arena in arenas().items()}
    if options.tune:
        retune({name: chosen[name] for name in options.tune}, options.out)
        return
    if not options.report_only:
        work(chosen, options)
    if not options.no_report:
        cells = {path.stem: json.loads(path.read_text()) for path in sorted((options.out / "cells").glob("*.json"))}
        print(write(cells, about(cells, options), options.out))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Architecture, sparsity and world, where the truth is known.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/truth"), help="directory of cells and report")
    parser.add_argument("--share", default="0/1", help="n/m: do the arenas and seeds whose number is n modulo m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-report", action="store_true")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--tune", nargs="+", metavar="ARENA", help="find the coefficients of these arenas again")
    parser.add_argument("--quick", action="store_true", help="few rows, small sizes")
    return parser.parse_args()


def work(chosen: dict[str, Arena], options: argparse.Namespace) -> None:
    """Train the cells of this process' share that have no result."""
    part, parts = (int(number) for number in options.share.split("/"))
    (options.out / "cells").mkdir(exist_ok=True)
    for number, (arena, seed) in enumerate(units(chosen)):
        missing = [c for c in cells_of(arena, seed) if not _path(options.out, c).exists()]
        if number % parts != part or not missing:
            continue
        rows = Rows(arena, seed)
        for cell in missing:
            start = time.monotonic()
            result = {"format": "crosscoder.truth-cell/1"} | run(cell, rows)
            result["seconds"] = round(time.monotonic() - start, 1)
            _write(_path(options.out, cell), result)
            print(f"{cell.name}: {result['seconds']} s, FVE {result['fve']:.3f}, L0 {result['l0']:.1f}", flush=True)


def units(chosen: dict[str, Arena]) -> Iterator[tuple[Arena, int]]:
    """Arenas and seeds, first seeds first, so that an interrupted run has something of everything."""
    for seed in range(max(NULL_SEEDS, *SEEDS.values())):
        for name, arena in chosen.items():
            if seed < SEEDS.get(name, NULL_SEEDS):
                yield arena, seed
    for seed in SECOND_SEEDS:
        yield from ((chosen[name], seed) for name in SECOND_ROUND)


def cells_of(arena: Arena, seed: int) -> list[Cell]:
    """The cells of one arena and seed."""
    listed = SECOND_ROUND[arena.name] if seed in SECOND_SEEDS else MATRIX[arena.name.split("-")[0]]
    return [_cell(arena.name, text, seed) for text in listed]


def _cell(arena: str, text: str, seed: int) -> Cell:
    architecture, sparsity, *across = text.split()
    kind, _, pressure = sparsity.partition("x")
    return Cell(arena, architecture, kind, seed, "independent" if across else "same", float(pressure or 1))


def retune(chosen: dict[str, Arena], out: Path) -> None:
    """Coefficients for every arena; they are copied into `truth_cells.arenas` by hand."""
    found: dict[str, dict[str, Any]] = {}
    for name, arena in chosen.items():
        for sparsity, tuned in tune(arena, Rows(arena, TUNING_SEED)):
            found.setdefault(name, {})[sparsity] = asdict(tuned)
            print(name, sparsity, tuned, flush=True)
            _write(out / "tuned.json", {"format": "crosscoder.tuned/1", "seed": TUNING_SEED, "found": found})


def about(cells: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What made these numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} thread(s) per process",
        "cells": len(cells),
        "training_seconds": round(sum(cell["seconds"] for cell in cells.values())),
        "quick": options.quick,
    }


def _path(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.json"


def _write(path: Path, result: dict[str, Any]) -> None:
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json_text(result, indent=None) + "\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
