"""Adam on the gradient clipped to a norm, with the clip folded into the update.

    n = ‖g‖ over all parameters      g ← g / max(1, (n + 10⁻⁶) / clip)      then Adam with β = 0.9, 0.999, ε = 10⁻⁸

The same as `clip_grad_norm_` and `torch.optim.Adam` in turn, but for rounding, in one pass less over all gradients. A
step whose loss or norm is not finite leaves parameters and moments as they were. Source: Kingma & Ba 2015; Pascanu et
al. 2013.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.crosscoder import Crosscoder

MOMENTS = ("exp_avg", "exp_avg_sq")


class ClippedAdam:
    """The optimiser of a crosscoder; `moments` is torch's own state, parameter by parameter."""

    def __init__(self, crosscoder: Crosscoder, *, learning_rate: float, clip: float) -> None:
        self._crosscoder = crosscoder
        self._clip = clip
        self._adam = torch.optim.Adam(crosscoder.parameters(), lr=learning_rate, fused=True)
        self._skipped: Tensor = crosscoder.bias.new_zeros(())
        self._count: Tensor | None = None

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """`exp_avg` and `exp_avg_sq` of every parameter, and `step` where an update is to go on from."""
        return self._adam.state

    @property
    def skipped(self) -> bool:
        """Whether a step was left out because its loss or gradient was not finite; waits for the device."""
        return bool(self._skipped > 0)

    def norm(self) -> Float[Tensor, ""]:
        """The norm of the gradient."""
        return torch.nn.utils.get_total_norm(self._gradients(), foreach=True)

    def update(
        self, norm: Float[Tensor, ""], *, loss: Float[Tensor, ""], learning_rate: float
    ) -> Sequence[Tensor] | None:
        """One step with gradients of that norm, which are spent by it.

        Where the device has a pass of its own, that gives the squared norms of each group's decoder rows, by source.
        """
        if self._crosscoder.backend.fused_adam:
            squares = self._in_one_pass(torch.where(loss.isfinite(), norm, torch.nan), learning_rate)
        else:
            squares = self._by_torch(norm, loss=loss, learning_rate=learning_rate)
        self._crosscoder.spend_gradients()
        return squares

    def _by_torch(self, norm: Tensor, *, loss: Tensor, learning_rate: float) -> None:
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

    def _in_one_pass(self, norm: Tensor, learning_rate: float) -> Sequence[Tensor]:
        """Clip, Adam, the rounded encoder and the decoder's norms, in one pass over memory."""
        from crosscoder.kernels.triton import adam

        state, count = self._moments()
        scalars = adam.scalars(count, norm=norm, max_norm=self._clip, learning_rate=learning_rate)
        self._skipped = self._skipped + (~norm.isfinite()).to(self._skipped)
        squares: list[Tensor] = []
        for weights, layout in zip(self._crosscoder.weights, self._crosscoder.layouts, strict=True):
            copies, widths = {"encoder": weights.rounded_in_place}, {"decoder": tuple(layout.stored_widths)}
            for name, parameter in weights.named_parameters():
                first, second = (state[parameter][key] for key in MOMENTS)
                found = adam.adam(
                    parameter.data,
                    _gradient(parameter),
                    exp_avg=first,
                    exp_avg_sq=second,
                    scalars=scalars,
                    copy=copies.get(name),
                    widths=widths.get(name),
                )
                squares += [] if found is None else [found]
            weights.note_rounded()
        bias = self._crosscoder.bias
        first, second = (state[bias][key] for key in MOMENTS)
        adam.adam(bias.data, _gradient(bias), exp_avg=first, exp_avg_sq=second, scalars=scalars)
        return squares

    def _moments(self) -> tuple[dict[Tensor, dict[str, Tensor]], Int[Tensor, ""]]:
        """torch's state, with zeros where it has none yet, and the number of updates before this one."""
        for parameter in self._crosscoder.parameters():
            if "exp_avg" not in self._adam.state[parameter]:
                zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
                self._adam.state[parameter] = {"step": parameter.new_zeros(()), **zeros}
        count = self._count
        if count is None:
            count = self._count = self._adam.state[self._crosscoder.bias]["step"].to(torch.int64, copy=True)
        return self._adam.state, count

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._crosscoder.parameters() if p.grad is not None]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
