"""Our training step on one acausal group, composed of the Triton kernels: no synchronisation with the host.

    p = x Eᵀ + b (bf16)   →   BatchTopK on p · gate, exact   →   error, code gradients   →   weight gradients   →   Adam

L = Σ ‖x − b_dec − f W‖² / rows. The gate is Σ_s ‖d^s‖; it and the bf16 copy of E come out of the optimiser's pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.kernels.operations import DecodeError
from crosscoder.kernels.triton.adam import adam, scalars
from crosscoder.kernels.triton.candidates import GroupScores
from crosscoder.kernels.triton.operations import decode_error, sum_by_latent
from crosscoder.kernels.triton.selection import Selection, batch_top_k, estimated_cut

NAMES = ("encoder", "encoder_bias", "decoder", "bias")
Mark = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What one step computed before its update."""

    selection: Selection
    left: DecodeError
    loss: Tensor
    gradients: dict[str, Tensor]
    norm: Tensor


class SparseStep:
    """Weights, moments and the cut of the next step; calling it is one update."""

    def __init__(
        self,
        encoder: Tensor,
        decoder: Tensor,
        *,
        widths: tuple[int, ...],
        k: int,
        learning_rate: float = 1e-4,
        max_norm: float = 1.0,
    ) -> None:
        self.widths, self.k, self.learning_rate, self.max_norm = widths, k, learning_rate, max_norm
        bias = (encoder.new_zeros(len(encoder)), decoder.new_zeros(decoder.shape[1]))
        self.weights = dict(zip(NAMES, (encoder, bias[0], decoder, bias[1]), strict=True))
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self.shadow = encoder.bfloat16()
        self.gate = torch.stack([part.norm(dim=1) for part in decoder.split(widths, dim=1)]).sum(0)
        self.number = torch.zeros((), dtype=torch.int64, device=encoder.device)
        self.cut: Tensor | None = None

    def __call__(self, x: Tensor, mark: Mark = lambda _: None) -> Outcome:
        """One update on rows (fp32); `mark` is called after every phase."""
        outcome = self.gradients(x, mark)
        self.update(outcome, mark)
        return outcome

    def group(self, x: Tensor) -> GroupScores:
        """The proposed scores of `x`."""
        w = self.weights
        pre = torch.addmm(w["encoder_bias"].bfloat16(), x.bfloat16(), self.shadow.T)
        return GroupScores(pre, self.gate, x, w["encoder"], w["encoder_bias"])

    def gradients(self, x: Tensor, mark: Mark = lambda _: None) -> Outcome:
        """Everything up to the gradients and their norm."""
        group = self.group(x)
        mark("encoder product")
        k_total = self.k * len(x)
        cut = estimated_cut([group], k_total=k_total) if self.cut is None else self.cut
        selection = batch_top_k([group], k_total=k_total, cut=cut)
        self.cut = selection.next_cut
        kept = selection.groups[0]
        mark("selection")
        left = decode_error(kept.pattern, kept.values, self.weights["decoder"], target=x - self.weights["bias"])
        mark("decode and code gradients")
        order = kept.pattern.rows_by_latent  # sorted once, here, for all gradients of weights
        assert order.shape == kept.values.shape
        mark("order by latent")
        slope = -2 / len(x)
        gradients = {
            "encoder": sum_by_latent(kept.pattern, slope * left.products, x),
            "encoder_bias": sum_by_latent(kept.pattern, slope * left.products, x.new_ones(len(x), 1)).view(-1),
            "decoder": sum_by_latent(kept.pattern, slope * kept.values, left.error),
            "bias": slope * left.error.sum(0),
        }
        mark("weight gradients")
        norm = torch.nn.utils.get_total_norm(list(gradients.values()), foreach=True)
        mark("gradient norm")
        return Outcome(selection, left, left.error.square().sum() / len(x), gradients, norm)

    def update(self, outcome: Outcome, mark: Mark = lambda _: None) -> None:
        """Adam on all weights, the encoder's copy and the decoder's gate with it."""
        packed = scalars(self.number, norm=outcome.norm, max_norm=self.max_norm, learning_rate=self.learning_rate)
        for name, weight in self.weights.items():
            m, v = self.moments[name]
            squares = adam(
                weight,
                outcome.gradients[name],
                exp_avg=m,
                exp_avg_sq=v,
                scalars=packed,
                copy=self.shadow if name == "encoder" else None,
                widths=self.widths if name == "decoder" else None,
            )
            if squares is not None:
                self.gate = squares.sqrt().sum(1)
        mark("optimiser")
