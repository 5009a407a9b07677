"""The run directory: where everything of one run lies, and whether a run may start, continue, or is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosscoder import files
from crosscoder.errors import RunConflict
from crosscoder.training import checkpoint
from crosscoder.training.config import RunConfig


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run; `claim` decides what the same command does next."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.path / "run.yaml"

    @property
    def crosscoder(self) -> Path:
        """The trained crosscoder; it exists once the run is finished."""
        return self.path / "crosscoder"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def analysis(self) -> Path:
        """The held-out analysis set."""
        return self.path / "analysis"

    @property
    def difference(self) -> Path:
        """The moments that a structureless null pair was made up with."""
        return self.path / "null_pair.safetensors"

    @property
    def finished(self) -> bool:
        """Whether training reached its last step."""
        return (self.crosscoder / "config.json").exists()

    @property
    def latest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest complete checkpoint."""
        found = checkpoint.found(self.checkpoints)
        return found[-1] if found else None

    def claim(self, run: RunConfig) -> None:
        """Take the directory for `run`; raises RunConflict when training there began with another configuration."""
        if not self.config.exists():
            self._refuse_strangers()
            return
        if not self.finished and self.latest_checkpoint is None:
            return  # nothing was trained yet: the new configuration takes the place of the old one
        there = RunConfig.load(self.config)
        differences = [d for d in run.differences(there) if d.key not in ("out", "format")]
        if differences:
            raise RunConflict(
                f"{self.path} holds a run with another configuration.",
                details=["key: asked for / there", *map(str, differences[:20])],
                hint="Go back to that configuration to continue it, or choose another directory with out=PATH.",
            )

    def _refuse_strangers(self) -> None:
        inside = self.path.iterdir() if self.path.is_dir() else []
        others = sorted(p.name for p in inside if not files.is_draft(p))
        if others:
            raise RunConflict(
                f"{self.path} exists, is not empty, and is not a run.",
                details=others[:8],
                hint="Choose another directory with out=PATH.",
            )


def common_checkpoints(directories: Sequence[RunDirectory], *, most_undone: int) -> list[checkpoint.Checkpoint]:
    """The newest checkpoints of one step, one per directory; none where all begin at the start.

    A process that is killed between two writes leaves directories one checkpoint apart. Raises RunConflict where more
    than `most_undone` steps of one of them would be done again.
    """
    found = [{c.step: c for c in checkpoint.found(directory.checkpoints)} for directory in directories]
    common = max(set.intersection(*(set(steps) for steps in found)), default=0)
    newest = [max(steps, default=0) for steps in found]
    if max(newest) - common > most_undone:
        raise RunConflict(
            "these dictionaries are not at one place of their stream, and cannot go on together.",
            details=[f"{d.path}  step {step:,}" for d, step in zip(directories, newest, strict=True)],
            hint="Leave out those that are behind until the others are finished: they see the same batches later on.",
        )
    return [steps[common] for steps in found] if common else []
