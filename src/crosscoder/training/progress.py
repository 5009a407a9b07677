"""The progress view: one row for each thing that takes time; of a run, rows per second, FVE, L0, dead and time left.

On a terminal the rows are live bars; elsewhere each is a plain line, about every five seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from crosscoder.training.sinks import RunStart

Clock = Callable[[], float]
SHOWN = {"fve": "FVE {:.3f}", "l0": "L0 {:.1f}", "dead_fraction": "dead {:.1%}"}
SECONDS_BETWEEN_LINES = 5.0


class ProgressView:
    """Bars on a terminal, lines elsewhere; itself the callback that long work takes as `progress`."""

    def __init__(self, console: Console | None = None, *, clock: Clock = time.monotonic) -> None:
        self.console = console or Console(stderr=True)
        self.clock = clock
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def __call__(self, description: str, done: int, total: int | None) -> None:
        """Show how far the work called `description` is."""
        self.show(description, done, total)

    def show(self, description: str, done: int, total: int | None, *, text: str = "") -> None:
        """The same, with further words beside it."""
        if self.console.is_terminal:
            self._show_bar(description, done, total, text=text)
            return
        now = self.clock()
        if done == total or now - self._last_line.setdefault(description, now) >= SECONDS_BETWEEN_LINES:
            self._last_line[description] = now
            part = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            line = "  ".join(filter(None, [description, part, text]))
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _show_bar(self, description: str, done: int, total: int | None, *, text: str) -> None:
        if description not in self._tasks:
            self._tasks[description] = self._bars.add_task(description, total=total, text="")
        self._bars.update(self._tasks[description], completed=done, total=total, text=text)


class ProgressSink:
    """Shows how far a run is; reads the metrics `fve`, `l0` and `dead_fraction` where they come."""

    def __init__(self, view: ProgressView, *, label: str = "training") -> None:
        self._view = view
        self._label = label
        self._latest: dict[str, float] = {}

    def open(self, start: RunStart) -> None:
        """Start the clock."""
        self._start = start
        self._began = self._view.clock()
        self._latest = {}

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the newest numbers."""
        self._latest.update({name: metrics[name] for name in SHOWN if name in metrics})
        self._view.show(self._label, step, self._start.num_steps, text=self.describe(step))

    def close(self) -> None:
        """Nothing to close: the view stays as it is."""

    def describe(self, step: int) -> str:
        """The numbers in words."""
        elapsed = max(1e-9, self._view.clock() - self._began)
        done = step - self._start.step
        parts = [f"{done * self._start.batch_size / elapsed:,.0f} rows/s"]
        parts += [form.format(self._latest[name]) for name, form in SHOWN.items() if name in self._latest]
        if done > 0 and step < self._start.num_steps:
            parts.append(f"{duration(elapsed / done * (self._start.num_steps - step))} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `3 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
