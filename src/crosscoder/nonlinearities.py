"""Nonlinearities: which pre-activations stay on. Frozen descriptions; thresholds and gate are the Crosscoder's state.

With pre-activations `p` (rows, latents), gate `g_i` and score `p_i · g_i`:

    ReLU          f = max(p, 0)
    TopK(k)       in each row, the k largest positive scores keep f = p, the others are 0
    BatchTopK(k)  in a batch of B rows, the k·B largest positive scores keep f = p; row by row: score > threshold

Sources: Makhzani & Frey 2013 and Gao et al. 2024 (TopK); Bussmann et al. 2024 (BatchTopK); selection on decoder-norm
scores is Minder et al. 2025, section 3. Fewer than k positive scores keep fewer: nothing negative or zero is ever kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from crosscoder.errors import ConfigError


@dataclass(frozen=True)
class ReLU:
    """`f = max(p, 0)`; sparsity comes from a penalty in the loss."""

    kind: ClassVar[Literal["relu"]] = "relu"


@dataclass(frozen=True)
class TopK:
    """Each row keeps its `k` largest positive scores."""

    k: int
    kind: ClassVar[Literal["topk"]] = "topk"

    def __post_init__(self) -> None:
        _check_k(self.k)


@dataclass(frozen=True)
class BatchTopK:
    """A batch keeps `k` positive scores per row on average; a calibrated threshold stands in for it at inference."""

    k: int
    kind: ClassVar[Literal["batch_topk"]] = "batch_topk"

    def __post_init__(self) -> None:
        _check_k(self.k)


Nonlinearity = ReLU | TopK | BatchTopK
KINDS: dict[str, type[Nonlinearity]] = {"relu": ReLU, "topk": TopK, "batch_topk": BatchTopK}


def active_per_row(nonlinearity: Nonlinearity) -> int | None:
    """The `k` that a nonlinearity was given, if it has one."""
    return None if isinstance(nonlinearity, ReLU) else nonlinearity.k


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"expected k of at least 1; got {k}.", hint="k is the number of active latents per row.")
