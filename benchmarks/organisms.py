"""Which method finds what a fine-tune planted: many small fine-tunes of a shipped model, with known truth.

An organism is the shipped `plain` tuned further for a minute, so that it does one thing more; what `plain` and every
organism have in common, template and dialogues included, is no difference. The null organisms are tuned as long on
dialogues in which nothing is planted. Every method then sees `plain`, one organism and text, and says which latents are
the organism's. Cells are JSON files, one per organism and seed; a finished cell, and a finished organism, is not made
again, so that a run goes on where it stopped, and a report can be written of the cells that are there.

    python benchmarks/organisms.py                      # all cells on one thread, then the report
    python benchmarks/organisms.py --only null topic    # some organisms
    python benchmarks/organisms.py --report-only        # the report of the cells that are there
    python benchmarks/organisms.py --quick --out runs/q # two plants, few rows: under ten minutes of two cores
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from organisms_cells import NULL, Books, Cell, Organism, Sizes
from organisms_findings import CALIBRATION_SEEDS, TEST_SEEDS
from organisms_methods import Shape
from organisms_report import write
from organisms_rows import Size
from organisms_tuning import Tuning

import crosscoder
from crosscoder.training.json_numbers import json_text

ORGANISMS = (
    Organism(NULL, None, Tuning(180)),
    Organism("persona", "persona", Tuning(160)),
    Organism("topic", "topic", Tuning(200)),
    Organism("trigger", "trigger", Tuning(240)),
    Organism("refusal", "refusal", Tuning(320)),
    Organism("knowledge", "knowledge", Tuning(320)),
    Organism("supervised", "demur", Tuning(160)),
    Organism("preferred", "demur", Tuning(80, batch_size=8, rate=5e-5, look_every=10), by_preference=True),
)
SEEDS = (0, 1, 2)
FULL = Sizes(Size(900, 24_000, 12_000), Shape(512, 16, 60_000, batch_size=512), num_prompts=30, num_unrelated=3)
QUICK = Sizes(Size(600, 20_000, 8_000), Shape(384, 16, 40_000, batch_size=512), num_prompts=20, num_unrelated=2)
QUICK_ORGANISMS = (NULL, "persona", "topic")


def main() -> None:
    """Make what is missing, then report."""
    options = arguments()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(options.threads)
    cells = options.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    planned = plan(options)
    if not options.report_only:
        for cell in planned:
            path = cells / f"{cell.name}.json"
            if not path.exists():
                make(cell, path)
    there = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(cells.glob("*.json"))]
    print(write(there, about(there, planned, options), options.out))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Planted fine-tunes, and which method finds what was planted.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/organisms"), help="cells, models and report")
    parser.add_argument("--only", nargs="+", metavar="ORGANISM", choices=[one.name for one in ORGANISMS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two plants and the null, one seed, few rows")
    return parser.parse_args()


def plan(options: argparse.Namespace) -> list[Cell]:
    """The cells in their order: nulls that calibrate, plants of the first seed, nulls that test, other seeds."""
    names = options.only or (QUICK_ORGANISMS if options.quick else [one.name for one in ORGANISMS])
    books = Books(options.out / "text")
    sizes = QUICK if options.quick else FULL
    calibrating, testing = ((0, 1), (3,)) if options.quick else (CALIBRATION_SEEDS, TEST_SEEDS)
    planted = [one for one in ORGANISMS if one.plant is not None and one.name in names]
    nulls = ORGANISMS[:1] if NULL in names else ()
    pairs = [(one, seed) for one in nulls for seed in calibrating]
    pairs += [(one, SEEDS[0]) for one in planted]
    pairs += [(one, seed) for one in nulls for seed in testing]
    pairs += [(one, seed) for seed in (() if options.quick else SEEDS[1:]) for one in planted]
    return [Cell(one, seed, sizes, books, options.out) for one, seed in pairs]


def make(cell: Cell, path: Path) -> None:
    """Run one cell and write it, whole or not at all."""
    start = time.monotonic()
    result = {"format": "crosscoder.organisms-cell/1", **cell.run()}
    result["seconds"] = round(time.monotonic() - start, 1)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json_text(result, indent=None) + "\n", encoding="utf-8")
    draft.replace(path)
    print(f"{cell.name}: {result['seconds']} s", flush=True)


def about(there: list[dict[str, Any]], planned: list[Cell], options: argparse.Namespace) -> dict[str, Any]:
    """What made these numbers, and which planned cells are missing."""
    names = {f"{cell['organism']}--{cell['seed']}" for cell in there}
    return {
        "date": datetime.date.today().isoformat(),
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} thread(s)",
        "cells": len(there),
        "minutes": round(sum(cell["seconds"] for cell in there) / 60, 1),
        "missing": [cell.name for cell in planned if cell.name not in names],
        "quick": options.quick,
    }


if __name__ == "__main__":
    main()
