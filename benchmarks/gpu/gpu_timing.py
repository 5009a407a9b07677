"""Times of steps and of their phases, and the memory that they hold."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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
    dead: int = 0
    """Latents that are dead at the end of it."""


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


def result(name: str, times: list[dict[str, float]], *, rows: int, held: float, dead: int) -> Result:
    """Medians of whole steps and of phases."""
    whole = [sum(phases.values()) for phases in times]
    phases = {phase: statistics.median(t[phase] for t in times) for phase in times[0]}
    middle = statistics.median(whole)
    return Result(name, rows, middle, min(whole), max(whole), rows / middle * 1e3, held, phases, dead)
