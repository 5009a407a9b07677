"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-N/shard-0-of-1.safetensors   weights, statistics, Adam's moments, dead counts
                      /state.json                 stream cursor, step, ranges of latent rows per shard
                      /complete                   written last; a directory without it is not a checkpoint

Whole directories are written beside their place and renamed, so a kill leaves the last complete one.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder import files
from crosscoder.activations import State
from crosscoder.crosscoder_files import set_tensors, tensors_of
from crosscoder.errors import FileFormatError, RunConflict
from crosscoder.kernels.cuts import Cut
from crosscoder.training.trainer import Trainer

THING = "checkpoint"
KEEP = 2
_SHARD = "shard-0-of-1.safetensors"
_NAME = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int


def save(trainer: Trainer, folder: Path, *, stream: State) -> Checkpoint:
    """Write `folder/step-N` and drop all but the newest two; raises DiskFull with nothing half-written."""
    path = folder / f"step-{trainer.step_number}"
    with files.replacing(path) as draft:
        draft.mkdir(parents=True)
        files.write_tensors(draft / _SHARD, _tensors(trainer), thing=THING)
        files.write_json(draft / "state.json", _state(trainer, stream))
        (draft / "complete").touch()
    for old in found(folder)[:-KEEP]:
        shutil.rmtree(old.path)
    for leftover in filter(files.is_draft, folder.iterdir()):
        shutil.rmtree(leftover)
    return Checkpoint(path, trainer.step_number)


def found(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, oldest first."""
    named = [(path, _NAME.match(path.name)) for path in folder.glob("step-*")]
    complete = [Checkpoint(path, int(m[1])) for path, m in named if m and (path / "complete").exists()]
    return sorted(complete, key=lambda checkpoint: checkpoint.step)


def restore(trainer: Trainer, checkpoint: Checkpoint) -> State:
    """Put the trainer where it was, and give the stream's cursor."""
    state = files.read_json(checkpoint.path / "state.json", thing=THING)
    _require_same_models(trainer, checkpoint, state["models"])
    tensors = files.read_tensors(checkpoint.path / _SHARD, thing=THING)
    model = {name.removeprefix("crosscoder."): t for name, t in tensors.items() if name.startswith("crosscoder.")}
    set_tensors(trainer.crosscoder, model, origin=str(checkpoint.path))
    _set_moments(trainer, tensors, origin=checkpoint.path)
    trainer.dead.rows_since_fired.copy_(tensors["dead.rows_since_fired"])
    trainer.step_number = int(state["step"])
    trainer.first_error = state.get("first_error")
    trainer.crosscoder.cuts = [Cut(**cut) for cut in state.get("cuts", [])] or trainer.crosscoder.cuts
    return state["stream"]


def _require_same_models(trainer: Trainer, checkpoint: Checkpoint, then: dict[str, Any]) -> None:
    now = trainer.crosscoder.provenance.get("models", {})
    if then != now:
        raise RunConflict(
            f"the models have changed since {checkpoint.path} was written.",
            details=[f"{alias}: then {then.get(alias)} / now {now.get(alias)}" for alias in {**then, **now}],
            hint="Put the models back as they were, or start a new run with out=PATH.",
        )


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {f"crosscoder.{name}": tensor for name, tensor in tensors_of(trainer.crosscoder).items()}
    for name, parameter in trainer.crosscoder.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = trainer.optimiser.state[parameter].get(moment)
            tensors[f"optimiser.{name}.{moment}"] = torch.zeros_like(parameter) if kept is None else kept
    return tensors | {"dead.rows_since_fired": trainer.dead.rows_since_fired}


def _state(trainer: Trainer, stream: State) -> dict[str, Any]:
    ranges = {group.name: [0, group.num_latents] for group in trainer.crosscoder.wiring}
    return {
        "format": f"crosscoder.{THING}/1",
        "step": trainer.step_number,
        "first_error": trainer.first_error,
        "cuts": [cut.saved for cut in trainer.crosscoder.cuts],
        "stream": stream,
        "shards": {_SHARD: {"latents": ranges}},
        "train": trainer.config.model_dump(mode="json"),
        "models": trainer.crosscoder.provenance.get("models", {}),
    }


def _set_moments(trainer: Trainer, tensors: dict[str, Tensor], *, origin: Path) -> None:
    for name, parameter in trainer.crosscoder.named_parameters():
        moments = {m: tensors.get(f"optimiser.{name}.{m}") for m in ("exp_avg", "exp_avg_sq")}
        if any(moment is None or moment.shape != parameter.shape for moment in moments.values()):
            raise FileFormatError(f"{origin} lacks the optimiser's state of {name}.", hint="Resume from an older one.")
        copies = {m: moment.to(parameter).clone() for m, moment in moments.items() if moment is not None}
        steps = torch.tensor(float(_steps(origin)), dtype=torch.float32, device=parameter.device)
        trainer.optimiser.state[parameter] = {"step": steps, **copies}


def _steps(origin: Path) -> int:
    return int(origin.name.removeprefix("step-"))
