"""Activity: a code as a training step needs it, group by group and with its graph.

Σ_rows f_i     what L1 penalises, and what tells the dead
f > 0          what is active; under JumpReLU a step also sees silent pairs in the window of their threshold
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.codes import SparseCode
from crosscoder.kernels.torch_ops import add_by_latent


@dataclass(frozen=True)
class Activity:
    """What a training step knows of a code: each group's reads, and its code; or the full matrix of values.

    In train mode JumpReLU's codes also hold the silent pairs in the windows of its thresholds, with the value 0.
    """

    reads: Sequence[Float[Tensor, "rows _"]]
    groups: Sequence[SparseCode]
    f: Float[Tensor, "rows latents"] | None = None
    pre: Sequence[Tensor] = ()
    """Pre-activations under ReLU and JumpReLU: of each group's pairs, or the one full matrix."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self.reads[0].shape[0]

    @cached_property
    def code(self) -> SparseCode:
        """The active pairs of all groups."""
        if self.f is not None:
            return SparseCode.from_dense(self.f)
        return SparseCode.side_by_side([code.active() for code in self.groups])

    @property
    def num_active(self) -> Int[Tensor, ""]:
        """How many pairs are active, on the device."""
        parts = [code.values for code in self.groups] if self.f is None else [self.f]
        return torch.stack([(part > 0).sum() for part in parts]).sum()

    @property
    def by_latent(self) -> Float[Tensor, "latents"]:
        """`Σ_rows f_i`; differentiable."""
        if self.f is not None:
            return self.f.sum(0)
        return torch.cat([add_by_latent(code.pattern, code.values) for code in self.groups])

    def detach(self) -> Activity:
        """The same without its graph and without matrices of pre-activations."""
        f = None if self.f is None else self.f.detach()
        return Activity(self.reads, [code.detach() for code in self.groups], f)
