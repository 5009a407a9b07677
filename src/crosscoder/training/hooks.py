"""What a run does beside its updates: records metrics, validates, and writes checkpoints."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from crosscoder.activations import ActivationSource, Batch
from crosscoder.training import checkpoint
from crosscoder.training.meter import Meter
from crosscoder.training.sinks import Sink
from crosscoder.training.trainer import StepResult, Trainer
from crosscoder.training.validation import validate

log = logging.getLogger(__name__)


class Recorder:
    """Sends metrics to a sink every `log_every` steps, and validation beside them every `evaluate_every`.

    A record also ends at every checkpoint, so that a run resumed from it records the same means as one never stopped.
    """

    def __init__(self, sink: Sink, meter: Meter, held_out: Sequence[Batch]) -> None:
        self.sink, self._meter, self._held_out = sink, meter, held_out
        self.last: dict[str, float] = {}

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Count the step, and record when it is time."""
        self._meter.add(result)
        step, config = trainer.step_number, trainer.config
        metrics: dict[str, float] = {}
        if _due(step, config.log_every, trainer) or _due(step, config.checkpoint_every, trainer):
            metrics = self._meter.read(trainer)
        if _due(step, config.evaluate_every, trainer) and self._held_out:
            found = validate(trainer.crosscoder, self._held_out)
            metrics |= {f"held_out/{name}": value for name, value in found.items()}
        if metrics:
            self.sink.record(step, metrics)
            self.last |= metrics


class Checkpointer:
    """Writes checkpoints of all dictionaries every `checkpoint_every` steps, and when the run was asked to stop."""

    def __init__(self, trainers: Sequence[tuple[Trainer, Path]], source: ActivationSource, stop: StopRequest) -> None:
        self._trainers, self._source, self._stop = trainers, source, stop

    def after_batch(self) -> None:
        """Write when it is time; raises KeyboardInterrupt after the last one when the run was asked to stop."""
        for trainer, folder in self._trainers:
            if self._stop.asked or _due(trainer.step_number, trainer.config.checkpoint_every, trainer):
                trainer.check_updates()
                checkpoint.save(trainer, folder, stream=self._source.state_dict())
        if self._stop.asked:
            raise KeyboardInterrupt


class StopRequest:
    """Whether someone pressed Ctrl-C or the system asked the process to end."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the first SIGINT or SIGTERM asks for a stop after this step; a second one acts as always."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before = before
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        log.warning("stopping after this step, with a checkpoint; once more stops at once.")
        signal.signal(number, self._before[signal.Signals(number)])


def _due(step: int, every: int | None, trainer: Trainer) -> bool:
    return step == trainer.num_steps or (every is not None and step % every == 0)
