"""Backend: what a kind of device has to offer, so that selection and autograd above it are written once.

    sum_by_row      y_r = Σ_{p in row r} v_p T_{i(p)}
    sum_by_latent   G_i = Σ_{p on i} v_p T_{r(p)}
    pair_products   u_p = L_{r(p)} · R_{i(p)}
    decode_error    e = y − Σ_{p in row r} v_p d_{i(p)}  and  u_p = e_{r(p)} · d_{i(p)}

Plain functions of detached tensors. The same input gives the same bits on one device. Selections are those of
`selection.py`, whatever the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jaxtyping import Float
from torch import Tensor

from crosscoder.codes import Pattern, SparseCode

if TYPE_CHECKING:
    from crosscoder.kernels.candidates import Encoding
    from crosscoder.kernels.cuts import Cut


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


class Selections(Protocol):
    """Which pairs are active, one code per group; exact in full precision."""

    def batch_top_k(self, encodings: Sequence[Encoding], k: int, cut: Cut) -> list[SparseCode]:
        """The k·rows largest positive scores of all groups together."""
        ...

    def top_k(self, encodings: Sequence[Encoding], k: int, cut: Cut) -> list[SparseCode]:
        """The k largest positive scores of every row among all groups together."""
        ...

    def above_threshold(
        self, encodings: Sequence[Encoding], thresholds: Sequence[Tensor], cut: Cut
    ) -> list[SparseCode]:
        """Every pair whose score is above its latent's threshold."""
        ...


@dataclass(frozen=True)
class Backend:
    """The kernels of one kind of device."""

    operations: Operations
    selections: Selections
    fused_adam: bool
    """Whether it has an optimiser pass of its own (`triton/adam.py`)."""
