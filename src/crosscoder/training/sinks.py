"""Sinks: where the metrics of a run go. `metrics.jsonl` is always written; a progress view and trackers are optional.

Every record is one step's `name: number` pairs. A tracker that fails costs one warning and is left out of the rest of
the run: it never ends it.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

from crosscoder.errors import FileFormatError, MissingExtra
from crosscoder.files import check_format, explaining_full_disk, read_json, replacing, write_json
from crosscoder.training.json_numbers import json_text

log = logging.getLogger(__name__)
FORMAT = "crosscoder.metrics/1"


@dataclass(frozen=True)
class RunStart:
    """What a sink learns when a run starts or continues."""

    directory: Path
    config: Mapping[str, Any]
    num_steps: int
    batch_size: int
    step: int = 0


class Sink(Protocol):
    """A receiver of metrics."""

    def open(self, start: RunStart) -> None:
        """Called once, before the first record; `start.step` is the step that a continued run goes on from."""
        ...

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with the metrics of one step."""
        ...

    def close(self) -> None:
        """Called once, at the end, however the run ended."""
        ...


class JsonlSink:
    """`metrics.jsonl` in the run directory: a line that says the format, then one object per record.

    On continuing, records past the restored step are removed, so that the file reads as if nothing had stopped.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def open(self, start: RunStart) -> None:
        """Make the file, or cut it back to the records up to `start.step`."""
        path = start.directory / "metrics.jsonl"
        kept = read_metrics(path, until=start.step) if path.exists() and start.step else []
        head: dict[str, Any] = {"format": FORMAT}
        with replacing(path) as draft:
            draft.write_text("".join(json_text(line) + "\n" for line in [head, *kept]), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and hand it to the system."""
        assert self._file is not None, "record before open"
        with explaining_full_disk(Path(self._file.name)):
            self._file.write(json_text({"step": step, **metrics}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def read_metrics(path: Path, *, until: int | None = None) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, up to step `until`; a last line that was cut short is left out."""
    head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    try:
        check_format(path, json.loads(head).get("format"), thing="metrics")
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    except (json.JSONDecodeError, AttributeError) as error:
        raise FileFormatError(f"{path} is not lines of JSON: {error}.", hint="Move it away and go on.") from error
    return [record for record in records if until is None or record["step"] <= until]


class TrackerSink:
    """Wraps a tracker so that its failures cost one warning and never the run."""

    def __init__(self, inner: Sink, *, name: str) -> None:
        self._inner = inner
        self._name = name
        self._works = True

    def open(self, start: RunStart) -> None:
        """Open the tracker."""
        self._attempt(lambda: self._inner.open(start))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the record on, while the tracker works."""
        self._attempt(lambda: self._inner.record(step, metrics))

    def close(self) -> None:
        """Close the tracker, if it still works."""
        self._attempt(self._inner.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 (a tracker can fail in any way, and the run must not)
            self._works = False
            log.warning("%s failed and is left out from here on: %s: %s", self._name, type(error).__name__, error)


class _Wandb:
    """Metrics to Weights & Biases; `tracker.json` in the run directory says which of its runs they belong to."""

    def __init__(self, wandb: ModuleType, *, project: str) -> None:
        self._wandb = wandb
        self._project = project
        self._run: Any = None

    def open(self, start: RunStart) -> None:
        """Start a run there, or go on with the one that this run started."""
        self._run = self._wandb.init(
            project=self._project,
            name=start.directory.name,
            id=_tracked_run(start),
            dir=str(start.directory),
            config=dict(start.config),
            resume="allow",
            reinit="create_new",  # dictionaries that train together are runs of their own there, at one time
        )

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


def _tracked_run(start: RunStart) -> str:
    """The tracker's name for this run: as kept when continuing, else a new one, since directory names repeat."""
    path = start.directory / "tracker.json"
    if start.step and path.exists():
        return str(read_json(path, thing="tracker")["wandb"])
    new = uuid.uuid4().hex
    write_json(path, {"format": "crosscoder.tracker/1", "wandb": new})
    return new


class _Tensorboard:
    """Metrics to TensorBoard's event files."""

    def __init__(self, tensorboard: ModuleType) -> None:
        self._tensorboard = tensorboard
        self._writer: Any = None

    def open(self, start: RunStart) -> None:
        """Write from here on; what an interrupted run wrote past the restored step is hidden."""
        folder = str(start.directory / "tensorboard")
        self._writer = self._tensorboard.SummaryWriter(folder, purge_step=start.step + 1 if start.step else None)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def wandb_sink(*, project: str = "crosscoder") -> Sink:
    """A sink that sends metrics to Weights & Biases; raises MissingExtra without the package."""
    return TrackerSink(_Wandb(_optional("wandb", extra="wandb"), project=project), name="wandb")


def tensorboard_sink() -> Sink:
    """A sink that writes TensorBoard files into the run directory; raises MissingExtra without the package."""
    _optional("tensorboard", extra="tensorboard")
    return TrackerSink(_Tensorboard(import_module("torch.utils.tensorboard")), name="tensorboard")


def _optional(package: str, *, extra: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtra(
            f"expected the package {package}; it is not installed.", hint=f"pip install 'crosscoder[{extra}]'"
        ) from error


class SinkGroup:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def open(self, start: RunStart) -> None:
        """Open all, in order."""
        for sink in self._sinks:
            sink.open(start)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the record to all, in order."""
        for sink in self._sinks:
            sink.record(step, metrics)

    def close(self) -> None:
        """Close all, in order."""
        for sink in self._sinks:
            sink.close()
