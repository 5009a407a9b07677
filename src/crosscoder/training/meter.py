"""Metrics of the training batches since the last record; reading them changes nothing that training uses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from crosscoder.crosscoder import Crosscoder

if TYPE_CHECKING:
    from crosscoder.training.trainer import StepResult, Trainer


class Meter:
    """Means over the steps since the last `read`, and rows per second."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self._variance = torch.tensor(_mean_width(crosscoder))
        self._keys = crosscoder.writes.keys
        self._clear()

    def add(self, result: StepResult) -> None:
        """Count one step; no value leaves the device."""
        scalars = [result.loss, result.sparsity, result.delta, result.auxiliary, result.gradient_norm]
        values = torch.cat([torch.stack(scalars), result.source_errors])
        self._sum = values if self._sum is None else self._sum + values
        self._steps += 1
        self._rows += result.num_rows
        self._active = self._active + result.num_active

    def read(self, trainer: Trainer) -> dict[str, float]:
        """The means, under the names of metrics.jsonl, and start afresh.

        `fve` here is of the training batches and takes the variance of a source to be what the normaliser made it.
        """
        if self._sum is None:
            return {}
        means = (self._sum / self._steps).tolist()
        seconds = time.monotonic() - self._since
        errors = dict(zip(self._keys, means[5:], strict=True))
        metrics = {
            "loss": means[0],
            "reconstruction": sum(errors.values()),
            "sparsity": means[1],
            "delta": means[2],
            "auxiliary": means[3],
            "gradient_norm": means[4],
            "fve": 1 - sum(errors.values()) / (float(self._variance) * len(errors)),
            **{f"fve/{key}": 1 - error / float(self._variance) for key, error in errors.items()},
            "l0": float(self._active) / self._rows,
            "dead_fraction": trainer.dead.count / trainer.crosscoder.num_latents,
            "learning_rate": trainer.learning_rate,
            "rows": float(trainer.step_number * trainer.config.batch_size),
            "rows_per_second": self._rows / seconds if seconds > 0 else 0.0,
        }
        self._clear()
        return metrics

    def _clear(self) -> None:
        self._sum: torch.Tensor | None = None
        self._active: torch.Tensor | int = 0
        self._steps = self._rows = 0
        self._since = time.monotonic()


def _mean_width(crosscoder: Crosscoder) -> float:
    """`E‖x̃_s‖²` of every source after normalising."""
    return crosscoder.sources.width / len(crosscoder.sources)
