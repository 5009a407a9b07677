"""Progress of long work: one callback, so that a library call can feed a bar, a log, or nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what is going on, how much is done, and of how much when that is known."""

    def __call__(self, description: str, done: int, total: int | None) -> None:
        """Called whenever some work is done; cheap enough to be called often."""
        ...


def silent(description: str, done: int, total: int | None) -> None:
    """Shows nothing."""
