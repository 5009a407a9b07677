"""A process of one contender: it builds it, steps when told, and says what the steps took.

A step's wall time is its own; whether it was *quiet* is told by what others took of the machine's cores meanwhile:
all busy time in /proc/stat less this process' own. Ticks there are of 10 ms, so it is told for a turn's steps together.
Peak memory is that of stepping (VmHWM, reset once the contender is built) less what was resident before it was built,
when its libraries had already been used on a tiny dictionary.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import step_peers
import torch
from step_contenders import CONTENDERS, Contender
from step_data import pool, start, untrained
from step_floor import RateMeter
from step_sizes import SMALLEST, Size
from torch import Tensor

FLOOR = "floor"
WARM_UP = 2
"""Steps before the first turn."""
AT_LEAST = 0.4
"""Seconds of counted steps in a turn."""
PROC = Path("/proc")


@dataclass(frozen=True)
class Task:
    """What a process has to do; picklable."""

    contender: str
    size: Size
    folder: Path
    dead: bool
    threads: int


@dataclass(frozen=True)
class Turn:
    """Counted steps in a row: seconds of each, CPU seconds of each, and what others took of the cores meanwhile."""

    seconds: list[float]
    cpu_seconds: list[float]
    foreign_share: float


def serve(connection: Connection, task: Task) -> None:
    """Answer until told to stop: `turn`, `memory`, `stop`; the first answer says that all is built."""
    try:
        torch.set_num_threads(task.threads)
        answers = _rates(task) if task.contender == FLOOR else _steps(task)
        connection.send("built")
        while (asked := connection.recv()) != ("stop",):
            name, *arguments = asked
            connection.send(answers[name](*arguments))
    except Exception as error:
        connection.send(RuntimeError(f"{task.contender}: {traceback.format_exc()}"))
        raise SystemExit(1) from error


def _rates(task: Task) -> dict[str, Callable[..., Any]]:
    meter = RateMeter(task.size)
    return {"turn": lambda _: meter.measure(), "memory": lambda: float("nan")}


def _steps(task: Task) -> dict[str, Callable[..., Any]]:
    step_peers.load(task.contender)
    batches = pool(task.folder)
    wake(task.contender)
    before = resident("VmRSS")
    contender = CONTENDERS[task.contender](start(task.size, task.folder, dead=task.dead))
    gc.collect()
    reset_peak()
    rows = cycle(batches)
    for _ in range(WARM_UP):
        contender.step(next(rows))
    return {
        "turn": lambda steps: turn(contender, rows, steps=steps),
        "memory": lambda: resident("VmHWM") - before,
    }


def wake(name: str) -> None:
    """Let a tiny contender of that name step, so that code which is loaded on its first use is not counted."""
    x = torch.randn(SMALLEST.batch_size, SMALLEST.total_width)
    contender = CONTENDERS[name](untrained(SMALLEST))
    for _ in range(WARM_UP):
        contender.step(x)
    _ = x.bfloat16() @ x.bfloat16().T
    gc.collect()


def turn(contender: Contender, rows: cycle[Tensor], *, steps: int) -> Turn:
    """One step that is not counted, since another process had the caches; then `steps` and AT_LEAST seconds of them."""
    contender.step(next(rows))
    seconds, cpu_seconds = list[float](), list[float]()
    busy, own = busy_seconds(), time.process_time()
    begin = time.perf_counter()
    while len(seconds) < steps or sum(seconds) < AT_LEAST:
        x, cpu, start_of_step = next(rows), time.process_time(), time.perf_counter()
        contender.step(x)
        seconds.append(time.perf_counter() - start_of_step)
        cpu_seconds.append(time.process_time() - cpu)
    wall = time.perf_counter() - begin
    foreign = busy_seconds() - busy - (time.process_time() - own)
    return Turn(seconds, cpu_seconds, max(0.0, foreign) / (wall * (os.cpu_count() or 1)))


def busy_seconds() -> float:
    """Seconds that the machine's cores have been busy since it started, or were taken from it; NaN where unknown."""
    if not (PROC / "stat").exists():
        return float("nan")
    fields = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, soft_irq, steal = (int(field) for field in fields)
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def resident(field: str) -> float:
    """A field of this process' status in bytes; NaN where there is none."""
    status = PROC / "self" / "status"
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return float(found[0]) if found else float("nan")


def reset_peak() -> None:
    """Let VmHWM begin anew at what is resident now."""
    if (PROC / "self" / "clear_refs").exists():
        (PROC / "self" / "clear_refs").write_text("5")
