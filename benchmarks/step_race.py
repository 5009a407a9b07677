"""The race: every contender in a process of its own, turn by turn, the order reversed from round to round.

All processes of a *heat* are alive together, and one steps while the others sleep. As many contenders as memory has
room for make a heat; ours is in every heat, so that every ratio is of turns in one round. Idle threads sleep at once
(`OMP_WAIT_POLICY=PASSIVE`), or a process would take the cores from the next.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from step_contenders import BASELINE
from step_floor import Rates
from step_sizes import Size
from step_worker import FLOOR, Task, Turn, serve

QUIET = 0.06
"""Others may take this share of the cores during a turn that counts as quiet."""
ROOM = 0.75
"""Of the memory that is available, a heat may plan with this share."""
PATIENCE = 600.0
"""Seconds to wait for an answer."""


@dataclass
class Contest:
    """Turns of one contender: by (heat, round)."""

    name: str
    turns: dict[tuple[int, int], Turn] = field(default_factory=dict[tuple[int, int], Turn])
    peak_bytes: float = float("nan")

    def times(self, *, quiet: bool) -> list[float]:
        """Seconds of all steps, or of the quiet ones."""
        return [s for t in self.turns.values() if not quiet or is_quiet(t) for s in t.seconds]

    @property
    def cpu_times(self) -> list[float]:
        """CPU seconds of all steps."""
        return [s for t in self.turns.values() for s in t.cpu_seconds]


@dataclass(frozen=True)
class Plan:
    """How a race is run."""

    size: Size
    folder: Path
    dead: bool
    threads: int
    rounds: int
    steps: int


def is_quiet(turn: Turn) -> bool:
    """Whether others let the turn alone; where that is unknown, it is assumed."""
    return not turn.foreign_share > QUIET


def race(plan: Plan, names: Sequence[str], say: Callable[[str], None]) -> tuple[dict[str, Contest], Rates]:
    """All turns of all contenders, and the best rates of the machine."""
    contests = {name: Contest(name) for name in names}
    rates = Rates(0.0, 0.0, 0.0, 0.0)
    for number, heat in enumerate(heats(plan.size, names)):
        say(f"size {plan.size.name}, dead {plan.dead}, heat {number + 1}: {'; '.join(heat)}")
        with ExitStack() as stack:
            workers = {name: stack.enter_context(_worker(plan, name)) for name in (*heat, FLOOR)}
            for worker in workers.values():
                worker.answer()  # built
            for this in range(plan.rounds):
                for name in workers if this % 2 == 0 else reversed(workers):
                    answer = workers[name].ask("turn", plan.steps)
                    if isinstance(answer, Rates):
                        rates = rates.best(answer)
                    else:
                        contests[name].turns[number, this] = answer
            for name in heat:
                contests[name].peak_bytes = workers[name].ask("memory")
    return contests, rates


def ratios(contest: Contest, baseline: Contest, *, quiet: bool, cpu: bool = False) -> list[float]:
    """The contender's time over ours, of every round in which both (were quiet and) had a turn."""
    both = [(turn, baseline.turns[place]) for place, turn in contest.turns.items() if place in baseline.turns]
    kept = [pair for pair in both if not quiet or all(is_quiet(turn) for turn in pair)]
    times: Callable[[Turn], list[float]] = lambda turn: turn.cpu_seconds if cpu else turn.seconds  # noqa: E731
    return [median(times(theirs)) / median(times(mine)) for theirs, mine in kept]


def heats(size: Size, names: Sequence[str], *, available: float | None = None) -> Iterator[list[str]]:
    """The contenders in groups that memory has room for, ours and the rates' process in each."""
    room = ROOM * (available_bytes() if available is None else available)
    at_once = max(1, int(room / bytes_of(size)) - 2)
    others = [name for name in names if name != BASELINE]
    for first in range(0, max(1, len(others)), at_once):
        yield [BASELINE, *others[first : first + at_once]]


def bytes_of(size: Size) -> float:
    """What the largest contender needs: weights, gradients, moments; matrices of rows × latents; pairs times width."""
    dense = 4.0 * size.batch_size * size.num_latents
    return 17.0 * size.num_weights + 4 * dense + 4.5 * size.num_active * size.total_width + 6e8


def available_bytes() -> float:
    """Memory that is free to take."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 8e9


@dataclass(frozen=True)
class _Worker:
    name: str
    connection: Any

    def ask(self, *question: object) -> Any:
        self.connection.send(question)
        return self.answer()

    def answer(self) -> Any:
        if not self.connection.poll(PATIENCE):
            raise TimeoutError(f"{self.name} has not answered for {PATIENCE:.0f} s")
        found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        return found


@contextmanager
def _worker(plan: Plan, name: str) -> Iterator[_Worker]:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read by the processes that are started, not by this one
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    task = Task(name, plan.size, plan.folder, plan.dead, plan.threads)
    process = context.Process(target=serve, args=(there, task), daemon=True)
    process.start()
    there.close()
    worker = _Worker(name, here)
    try:
        yield worker
        here.send(("stop",))
    finally:
        process.join(5)
        if process.is_alive():
            process.terminate()
