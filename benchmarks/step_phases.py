"""Where a step of ours spends its time: by function of the library, and by operation of torch.

Torch works synchronously on a CPU, so all time that passes while a function of the library is on top of the Python
stack is that function's: its own, and that of the operations and foreign functions that it calls. The interpreter's
profile hook tells, which needs no instrumentation and no names that could go out of date. Backward passes count too:
they are Python functions, called by autograd in this thread.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from step_contenders import CONTENDERS
from step_data import pool, start
from step_worker import WARM_UP, Task
from torch.profiler import ProfilerActivity, profile

import crosscoder

PACKAGE = str(Path(crosscoder.__file__).parent)
STEPS = 5
NUM_OPERATIONS = 12


class TimeByFunction:
    """A profile hook that adds up seconds for the innermost function of the library."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack = ["outside"]
        self._last = time.perf_counter()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Called by the interpreter whenever a function is entered or left."""
        if event not in ("call", "return"):
            return
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        if event == "call":
            self._stack.append(self._name(frame) or self._stack[-1])
        elif len(self._stack) > 1:
            self._stack.pop()
        self._last = time.perf_counter()

    @staticmethod
    def _name(frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return None
        return f"{file[len(PACKAGE) + 1 : -3].replace('/', '.')}.{frame.f_code.co_qualname.split('.<')[0]}"


def phases(task: Task) -> dict[str, dict[str, float]]:
    """Milliseconds of the fastest step by function of the library, and per step by operation of torch."""
    torch.set_num_threads(task.threads)
    batches = cycle(pool(task.folder))
    contender = CONTENDERS[task.contender](start(task.size, task.folder, dead=task.dead))

    def step() -> None:
        contender.step(next(batches))

    for _ in range(WARM_UP):
        step()
    fastest = min((by_function(step) for _ in range(STEPS)), key=lambda found: sum(found.values()))
    return {"functions": longest_first(fastest), "operations": longest_first(by_operation(step))}


def by_function(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step in each function of the library."""
    hook = TimeByFunction()
    sys.setprofile(hook)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {name: seconds * 1e3 for name, seconds in hook.seconds.items()}


def by_operation(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds per step that each of the longest of torch's operations takes by itself, in the calling thread."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    events: Any = profiler.key_averages()
    longest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:NUM_OPERATIONS]
    return {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in longest}


def longest_first(milliseconds: Mapping[str, float]) -> dict[str, float]:
    """In order."""
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))
