"""The training step beside others': ratios of one run, floor, phases, memory, exactness.

    python benchmarks/step.py                       # A, B, C, without and with dead latents: half an hour
    python benchmarks/step.py --quick               # one small size, a minute or two: shows that it runs
    python benchmarks/step.py --size C --rounds 9   # one size; the others' cells stay in the report
    python benchmarks/step.py --report-only         # the report of the cells that are there
    python benchmarks/step.py --no-peers --contenders ours dense

Ours is `Trainer.step`, with BatchTopK. Every contender has a process of its own and starts with the same trained
weights (`step_data.py`); turns alternate (`step_race.py`), steps that others disturbed are marked (`step_worker.py`).
Peers are in the extra `bench`. A finished size leaves a cell in the output directory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from step_check import check
from step_contenders import BASELINE, CHECKED, CONTENDERS, available
from step_data import explained, prepare
from step_floor import floor
from step_phases import phases
from step_race import Plan, race
from step_report import write
from step_sizes import QUICK, SIZES, Size
from step_summary import about, summaries
from step_worker import Task

from crosscoder.training.json_numbers import json_text

FORMAT = "crosscoder.step/1"
SCENARIOS = {"alive": False, "dead": True}
INEXACT = "dense, bf16 (inexact)"
Result = TypeVar("Result")


def main() -> None:
    """Measure what is asked for, then report on all that was measured."""
    options = arguments()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "99"}  # for the processes that are started
    names, missing = chosen(options)
    (options.out / "cells").mkdir(parents=True, exist_ok=True)
    for size in [] if options.report_only else options.sizes:
        cell = measure(size, names, options) | {"missing": missing, "quick": options.quick}
        (options.out / "cells" / f"{size.name}.json").write_text(json_text(cell) + "\n", encoding="utf-8")
    wanted = [QUICK.name] if options.quick else list(SIZES)
    paths = [path for name in wanted if (path := options.out / "cells" / f"{name}.json").exists()]
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    text = write(cells, options.out)
    print(json_text(cells, indent=1) if options.json else text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Our training step beside others', in one run.")
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes to measure")
    parser.add_argument("--quick", action="store_true", help="one small size, few rounds")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=2, help="counted steps in a turn, at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--training-steps", type=int, help="steps before timing, instead of the size's own")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=f"some of: {'; '.join(CONTENDERS)}")
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="sparsify and sae-lens")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/step-weights"), help="rows and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step"), help="directory of cells and report")
    parser.add_argument("--report-only", action="store_true", help="only report on the cells that are there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    options = parser.parse_args()
    options.sizes = [QUICK] if options.quick else [SIZES[name] for name in options.size]
    if options.training_steps is not None:
        options.sizes = [replace(size, training_steps=options.training_steps) for size in options.sizes]
    options.rounds = min(options.rounds, 3) if options.quick else options.rounds
    return options


def chosen(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The contenders that take part, ours always, and lines on those that cannot."""
    names, missing = available(peers=options.peers)
    wanted = options.contenders or names
    unknown = sorted(set(wanted) - set(CONTENDERS))
    if unknown:
        sys.exit(f"no contender is called {', '.join(unknown)}; there are: {'; '.join(CONTENDERS)}")
    return [name for name in names if name in wanted or name == BASELINE], missing


def measure(size: Size, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one size, as it is written to its cell."""
    say(f"size {size.name}: {size.shape}; {size.training_steps} training steps, if they are not cached")
    folder = apart(prepare, size, options.cache)
    plans = [
        Plan(size, folder, SCENARIOS[name], options.threads, options.rounds, options.steps)
        for name in options.scenarios
    ]
    cell: dict[str, Any] = {"format": FORMAT, "size": asdict(size), "about": about(plans[0]), "scenarios": {}}
    cell["fve"] = explained(folder)
    for name, plan in zip(options.scenarios, plans, strict=True):
        contests, rates = race(plan, names, say)
        cell["scenarios"][name] = {
            "contenders": summaries(contests, plan),
            "rates": asdict(rates),
            "floor_ms": {kind: 1e3 * seconds for kind, seconds in asdict(floor(size, rates)).items()},
            **apart(examine, plan, names),
        }
    return cell


def examine(plan: Plan, names: list[str]) -> dict[str, Any]:
    """Where our step spends its time, and whether it and what it is compared with are right."""
    tasks = {name: Task(name, plan.size, plan.folder, plan.dead, plan.threads) for name in names}
    checks = {name: check(task) for name, task in tasks.items() if name in (*CHECKED, INEXACT)}
    return {"phases": phases(tasks[BASELINE]), "checks": checks}


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """What the function gives, called in a process of its own, whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def say(line: str) -> None:
    """Progress goes to the error stream, so that the report can be piped."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
