"""The progress view of a run: rows per second, FVE, L0, dead latents and the time left.

On a terminal it is one live line; elsewhere it is a plain line about every five seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from crosscoder.training.sinks import RunStart

SHOWN = {"fve": "FVE {:.3f}", "l0": "L0 {:.1f}", "dead_fraction": "dead {:.1%}"}
SECONDS_BETWEEN_LINES = 5.0


class ProgressSink:
    """Shows how far a run is; reads the metrics `fve`, `l0` and `dead_fraction` where they come."""

    def __init__(
        self, console: Console | None = None, *, label: str = "train", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True)
        self._label = label
        self._clock = clock
        self._latest: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def open(self, start: RunStart) -> None:
        """Start the clock and the bar."""
        self._start = start
        self._began = self._last_line = self._clock()
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(self._label, total=start.num_steps, completed=start.step, text="")
            self._bar.start()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the newest numbers."""
        self._latest.update({name: metrics[name] for name in SHOWN if name in metrics})
        text = self.describe(step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self._start.num_steps or self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self._console.print(f"{self._label}  step {step:,} of {self._start.num_steps:,}  {text}", highlight=False)

    def close(self) -> None:
        """Take the bar down, leaving its last state."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def describe(self, step: int) -> str:
        """The numbers in words."""
        elapsed = max(1e-9, self._clock() - self._began)
        done = step - self._start.step
        parts = [f"{done * self._start.batch_size / elapsed:,.0f} rows/s"]
        parts += [form.format(self._latest[name]) for name, form in SHOWN.items() if name in self._latest]
        if 0 < step < self._start.num_steps and done > 0:
            parts.append(f"{duration(elapsed / done * (self._start.num_steps - step))} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `3 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
