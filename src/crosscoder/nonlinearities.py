"""Nonlinearities: which pre-activations stay on. Frozen descriptions; thresholds and gate are the Crosscoder's state.

With pre-activations `p` (rows, latents), gate `g_i` and score `p_i · g_i`:

    ReLU          f = max(p, 0)
    JumpReLU      f = p · 1[p > θ_i],  θ_i learned
    TopK(k)       in each row, the k largest positive scores keep f = p, the others are 0
    BatchTopK(k)  in a batch of B rows, the k·B largest positive scores keep f = p; row by row: score > threshold

k counts the active latents of all groups together. A group with its own k chooses among its own, and the others share
what is left: these are the *budgets* of a wiring. The gate is the code norm of the decoder, over the sources that a
latent writes:

    sum  Σ_s ‖d_i^s‖      concat  sqrt(Σ_s ‖d_i^s‖²)      max  max_s ‖d_i^s‖      none  1

Sources: Makhzani & Frey 2013 and Gao et al. 2024 (TopK); Bussmann et al. 2024 (BatchTopK); selection on decoder-norm
scores is Minder et al. 2025, section 3; Rajamanoharan et al. 2024 and Anthropic, January 2025 (JumpReLU). Fewer than k
positive scores keep fewer: nothing negative or zero is ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from crosscoder.errors import ConfigError, WiringError
from crosscoder.wiring import Wiring

CodeNorm = Literal["sum", "concat", "max", "none"]


@dataclass(frozen=True)
class ReLU:
    """`f = max(p, 0)`; sparsity comes from a penalty in the loss."""

    kind: ClassVar[Literal["relu"]] = "relu"
    code_norm: ClassVar[CodeNorm] = "sum"


@dataclass(frozen=True)
class JumpReLU:
    """`f = p · 1[p > θ]` with a learned `θ = exp(log_threshold)` per latent; a tanh or L1 penalty makes it sparse.

    `bandwidth` is the width ε of the window in which the straight-through gradient of the threshold acts.
    """

    bandwidth: float = 2.0
    initial_threshold: float = 0.1
    kind: ClassVar[Literal["jump_relu"]] = "jump_relu"
    code_norm: ClassVar[CodeNorm] = "sum"

    def __post_init__(self) -> None:
        for name in ("bandwidth", "initial_threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"expected a {name} above 0; got {getattr(self, name)}.")


@dataclass(frozen=True)
class TopK:
    """Each row keeps its `k` largest positive scores."""

    k: int
    code_norm: CodeNorm = "sum"
    kind: ClassVar[Literal["topk"]] = "topk"

    def __post_init__(self) -> None:
        _check_k(self.k, self.code_norm)


@dataclass(frozen=True)
class BatchTopK:
    """A batch keeps `k` positive scores per row on average; a calibrated threshold stands in for it at inference."""

    k: int
    code_norm: CodeNorm = "sum"
    kind: ClassVar[Literal["batch_topk"]] = "batch_topk"

    def __post_init__(self) -> None:
        _check_k(self.k, self.code_norm)


Nonlinearity = ReLU | JumpReLU | TopK | BatchTopK
KINDS: dict[str, type[Nonlinearity]] = {"relu": ReLU, "jump_relu": JumpReLU, "topk": TopK, "batch_topk": BatchTopK}


def active_per_row(nonlinearity: Nonlinearity) -> int | None:
    """The `k` that a nonlinearity was given, if it has one."""
    return nonlinearity.k if isinstance(nonlinearity, TopK | BatchTopK) else None


@dataclass(frozen=True)
class Budget:
    """Groups that share `k` active latents per row, by their number in the wiring."""

    groups: tuple[int, ...]
    k: int


def budgets(wiring: Wiring, k: int) -> list[Budget]:
    """Who shares the `k` active latents of a row: each group with its own k, and the others what is left of it.

    Raises WiringError when the groups' own k do not fit into `k`, or a budget exceeds its latents.
    """
    own = [Budget((i,), group.k) for i, group in enumerate(wiring) if group.k is not None]
    pooled = tuple(i for i, group in enumerate(wiring) if group.k is None)
    left = k - sum(budget.k for budget in own)
    if left < (1 if pooled else 0) or (left and not pooled):
        raise WiringError(
            f"the groups' own k must {'leave something of' if pooled else 'add up to'} the nonlinearity's k = {k}.",
            details=[f"{group.name}  k = {group.k or 'a share of what is left'}" for group in wiring],
            hint="k of the nonlinearity is the number of active latents per row in all groups together.",
        )
    found = [*own, Budget(pooled, left)] if pooled else own
    check_budgets(wiring, found)
    return found


def scaled(found: Sequence[Budget], k: int) -> list[Budget]:
    """The same budgets when all together have about `k`, as a schedule asks: each rounded, and at least one."""
    total = sum(budget.k for budget in found)
    return [Budget(budget.groups, max(1, round(budget.k * k / total))) for budget in found]


def check_budgets(wiring: Wiring, found: Sequence[Budget]) -> None:
    """Raises WiringError for a budget that exceeds its latents."""
    for budget in found:
        room = sum(wiring.groups[i].num_latents for i in budget.groups)
        if budget.k > room:
            raise WiringError(f"expected k of at most the {room} latents it selects from; got {budget.k}.")


def check(wiring: Wiring, nonlinearity: Nonlinearity) -> None:
    """Raises WiringError for groups that the nonlinearity cannot serve."""
    k = active_per_row(nonlinearity)
    if k is not None:
        budgets(wiring, k)
    for group in wiring:
        if k is None and group.k is not None:
            raise WiringError(
                f"group {group.name!r} has its own k, which {nonlinearity.kind} has no use for.",
                hint="Use TopK or BatchTopK, or leave k out.",
            )
        if k is not None and group.penalty != 1.0:
            raise WiringError(
                f"group {group.name!r} has the penalty {group.penalty}, but {nonlinearity.kind} is not penalised.",
                hint="Set penalty=1.0 and give the group its own k, or use ReLU or JumpReLU with a penalty.",
            )


def _check_k(k: int, code_norm: CodeNorm) -> None:
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"expected a whole k of at least 1; got {k}.", hint="k is the active latents per row.")
    if code_norm not in get_args(CodeNorm):
        raise ConfigError(f"expected a code norm among {', '.join(get_args(CodeNorm))}; got {code_norm!r}.")
