"""A block of rows in memory, of fixed size in bytes, filled anew as often as wanted."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import Batch, Rows

_PLACE = {"context": torch.int64, "position": torch.int32, "role": torch.int8}
_PLACE_BYTES = sum(dtype.itemsize for dtype in _PLACE.values())


def bytes_per_row(width: int, dtype: torch.dtype) -> int:
    """What one row and its place take in a buffer."""
    return width * dtype.itemsize + _PLACE_BYTES


class RowBuffer:
    """Up to `capacity` packed rows in `dtype`, with where each came from."""

    def __init__(self, capacity: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._x = torch.empty(capacity, width, dtype=dtype, device=device)
        self._places = {name: torch.empty(capacity, dtype=kind, device=device) for name, kind in _PLACE.items()}
        self.num_rows = 0

    def clear(self) -> None:
        """Forget all rows."""
        self.num_rows = 0

    def reserve(self, rows: Rows) -> Float[Tensor, "rows width"]:
        """Room for as many more rows, which lie where `rows` says: to be written before any row is taken."""
        start, self.num_rows = self.num_rows, self.num_rows + len(rows.position)
        for name, column in self._places.items():
            place = getattr(rows, name)
            column[start : self.num_rows].copy_(place, non_blocking=place.is_pinned())
        return self._x[start : self.num_rows]

    def take(self, chosen: Int[Tensor, "rows"]) -> Batch:
        """The chosen rows, in fp32; the choice is best made on the buffer's own device."""
        chosen = chosen.to(self._x.device)
        places = {name: column[chosen].long() for name, column in self._places.items()}
        return Batch(self._x[chosen].float(), Rows(**places))
