"""Adam on the gradient clipped to a norm, with the clip folded into the update.

    n = ‖g‖ over all parameters      g ← g / max(1, (n + 10⁻⁶) / clip)      then Adam with β = 0.9, 0.999, ε = 10⁻⁸

The same as `clip_grad_norm_` and `torch.optim.Adam` in turn, but for rounding, in one pass less over all gradients. A
step whose loss or norm is not finite leaves parameters and moments as they were. Source: Kingma & Ba 2015; Pascanu et
al. 2013.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.crosscoder import Crosscoder


class ClippedAdam:
    """The optimiser of a crosscoder; `moments` is torch's own state, parameter by parameter."""

    def __init__(self, crosscoder: Crosscoder, *, learning_rate: float, clip: float) -> None:
        self._crosscoder = crosscoder
        self._clip = clip
        self._adam = torch.optim.Adam(crosscoder.parameters(), lr=learning_rate, fused=True)
        self._skipped: Tensor = crosscoder.bias.new_zeros(())

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """`exp_avg`, `exp_avg_sq` and `step` of every parameter."""
        return self._adam.state

    @property
    def skipped(self) -> bool:
        """Whether a step was left out because its loss or gradient was not finite; waits for the device."""
        return bool(self._skipped > 0)

    def norm(self) -> Float[Tensor, ""]:
        """The norm of the gradient."""
        return torch.nn.utils.get_total_norm(self._gradients(), foreach=True)

    def update(self, norm: Float[Tensor, ""], *, loss: Float[Tensor, ""], learning_rate: float) -> None:
        """One step with gradients of that norm, which are spent by it."""
        divisor = ((norm + 1e-6) / self._clip).clamp(min=1.0)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        on_cpu = norm.device.type == "cpu"
        if norm.dtype != torch.float32:  # the fused update takes no other scale
            torch._foreach_div_(self._gradients(), divisor)  # pyright: ignore[reportPrivateUsage]
        elif not on_cpu or divisor > 1:
            self._adam.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]
        if not on_cpu:
            bad = (~torch.isfinite(loss + norm)).float()
            self._adam.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
            self._skipped = self._skipped + bad
        self._adam.step()
        self._adam.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        self._crosscoder.spend_gradients()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._crosscoder.parameters() if p.grad is not None]
