"""Operations: what a backend has to offer, so that the autograd above it is written once (`sparse.py`).

    sum_by_row      y_r = Σ_{p in row r} v_p T_{i(p)}
    sum_by_latent   G_i = Σ_{p on i} v_p T_{r(p)}
    pair_products   u_p = L_{r(p)} · R_{i(p)}
    decode_error    e = y − Σ_{p in row r} v_p d_{i(p)}  and  u_p = e_{r(p)} · d_{i(p)}

Plain functions of detached tensors. The same input gives the same bits on one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from crosscoder.codes import Pattern


@dataclass(frozen=True)
class DecodeError:
    """The error of a reconstruction, and its product with every active pair's decoder row."""

    error: Float[Tensor, "rows width"]
    products: Float[Tensor, "active"]


class Operations(Protocol):
    """The sparse primitives of one backend."""

    def sum_by_row(self, pattern: Pattern, weights: Tensor, table: Tensor) -> Tensor:
        """Sums over each row's pairs of weighted rows of a table by latent."""
        ...

    def sum_by_latent(self, pattern: Pattern, weights: Tensor, table: Tensor, *, out: Tensor) -> Tensor:
        """Sums over each latent's pairs of weighted rows of a table by row, written into `out`."""
        ...

    def pair_products(self, pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
        """For every pair, the product of its row of one table with its latent's row of another."""
        ...

    def decode_error(self, pattern: Pattern, values: Tensor, decoder: Tensor, *, target: Tensor) -> DecodeError:
        """What a code leaves of its target, with the products that its values' gradients are made of."""
        ...
