"""Memory of spent gradients, kept to be written again.

On a CPU the first touch of fresh memory costs more than the sums that fill it: the operating system hands it out page
by page. A trainer gives back the gradients that an update has used; the next backward pass writes into them.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor


class Spares:
    """Spent gradients by name. Copies of it are empty: what it holds belongs to one step of one trainer."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def put(self, name: str, gradient: Tensor | None) -> None:
        """Keep a gradient that nothing else refers to any more."""
        if gradient is not None:
            self._held[name] = gradient

    def clear(self) -> None:
        """Keep nothing."""
        self._held.clear()

    def take(self, name: str, like: Tensor) -> Tensor:
        """Memory of the shape and kind of `like`, with anything in it."""
        held = self._held.pop(name, None)
        fits = held is not None and (held.shape, held.dtype, held.device) == (like.shape, like.dtype, like.device)
        return held if held is not None and fits else like.new_empty(like.shape)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)()
