"""What every supplier of activations gives: packed rows, with where each row came from.

The live stream, a store on disk and a synthetic world are all an `ActivationSource`; nothing else feeds training
or analysis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.sources import SourceSet

ROLES = ("text", "system", "user", "assistant", "template")
"""Who speaks a token; a row's role is an index into this."""

State = dict[str, Any]
"""A place in a stream: JSON values only."""


@dataclass(frozen=True)
class Rows:
    """Where each row lies: its context, the position in it, and the role."""

    context: Int[Tensor, "rows"]
    position: Int[Tensor, "rows"]
    role: Int[Tensor, "rows"]


@dataclass(frozen=True)
class Batch:
    """Packed raw activations of some rows, and where the rows lie when that is known."""

    x: Float[Tensor, "rows width"]
    rows: Rows | None = None


class ActivationSource(Protocol):
    """Anything that gives packed activations of `sources`."""

    @property
    def sources(self) -> SourceSet:
        """The sources, in the order in which rows pack them."""
        ...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Shuffled rows for training, `batch_size` at a time."""
        ...

    def contexts(self) -> Iterator[Batch]:
        """Rows in the order of the text, whole contexts at a time."""
        ...

    def state_dict(self) -> State:
        """The place after the last batch that was delivered."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        ...
