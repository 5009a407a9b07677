"""The run directory: where everything of one run lies, and whether a run may start, continue, or is finished."""

from __future__ import annotations

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
