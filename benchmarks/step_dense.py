"""What the step is compared with: a dense step as good as torch operations make it, and a textbook sparse TopK step.

    dense     p = x̃ W_encᵀ + b,  f = p · 1[p g ≥ the k·B-th largest],  e = x̃ − f W_dec − b_dec,  five products
    textbook  the k largest of each row; embedding_bag decodes, index_add_ gathers the encoder's gradient, as sparsify

Both minimise what our trainer does: `mean ‖e‖² + α AuxK`, with the same AuxK on the dead latents alone (decision 7),
the same clipping and Adam, so that gradients can be compared. The dense step is no straw man: no sort (scores above
nine tenths of the last threshold, then the k-th of those), Adam fused, clipping folded into it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from step_data import Start
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from crosscoder.training.trainer import AUX_CANDIDATES, AUX_ROWS

AUX_COEFFICIENT = 0.03125
GRADIENT_CLIP = 1.0
LEARNING_RATE = 1e-6
"""Small: every timed step is on the trained weights."""
DEAD_AFTER_ROWS = 10_000_000
LONG_AGO = 1 << 40
CUT = 0.9
NAMES = ("encoder", "encoder_bias", "decoder", "bias")


@dataclass(frozen=True)
class FirstUpdate:
    """What the first update on the trained weights kept, and its gradients before clipping."""

    kept: Tensor
    gradients: dict[str, Tensor]


class DenseModel:
    """Parameters, gate and dead counts as plain tensors, in any dtype; the loss for a given set of active pairs."""

    def __init__(self, start: Start, *, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.k_aux = start.size, max(1, start.size.width // 2)
        self.parameters = {name: nn.Parameter(start.tensors[name].to(dtype, copy=True)) for name in NAMES}
        self.encoder, self.encoder_bias, self.decoder, self.bias = self.parameters.values()
        self.normalised = start.normaliser(dtype)
        self.dead_after = DEAD_AFTER_ROWS
        self.rows_since_fired = torch.zeros(start.size.num_latents, dtype=torch.int64)
        self.rows_since_fired[start.dead] = LONG_AGO
        self.step_number = 0
        self.gate: Tensor
        self.refresh_gate()

    def pre_activations(self, x: Tensor) -> Tensor:
        """`p`."""
        return torch.addmm(self.encoder_bias, x, self.encoder.T)

    @torch.no_grad()
    def refresh_gate(self) -> None:
        """`g_i = Σ_s ‖d_i^s‖`."""
        by_source = self.decoder.view(self.size.num_latents, self.size.num_sources, self.size.width)
        self.gate = by_source.norm(dim=2).sum(1)

    def loss(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """`mean ‖e‖² + α AuxK`."""
        error = x - reconstruction
        return error.square().sum() / len(x) + self.auxiliary(x, error.detach())

    def auxiliary(self, x: Tensor, error: Tensor) -> Tensor:
        """`α ‖e − ê‖²` of the dead latents whose turn it is, on every fourth row."""
        dead = (self.rows_since_fired >= self.dead_after).nonzero().squeeze(1)
        if not len(dead):
            return error.new_zeros(())
        if len(dead) > AUX_CANDIDATES:
            dead = dead.roll(-(self.step_number * AUX_CANDIDATES) % len(dead))[:AUX_CANDIDATES].sort().values
        rows = slice(self.step_number % AUX_ROWS, None, AUX_ROWS)
        pre = torch.addmm(self.encoder_bias[dead], x[rows], self.encoder[dead].T)
        best = (pre.detach() * self.gate[dead]).topk(min(self.k_aux, len(dead)), dim=1).indices
        f = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best).relu())
        return AUX_COEFFICIENT * (error[rows] - f @ self.decoder[dead]).square().sum() / len(x[rows])

    def count(self, fired: Tensor, num_rows: int) -> None:
        """Let the dead counts follow which latents fired."""
        self.rows_since_fired += num_rows
        self.rows_since_fired[fired] = 0
        self.step_number += 1

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients."""
        return {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}


class FusedAdam:
    """Adam in one pass over the weights, which scales a long gradient down on the way."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._adam: Any = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
        self._adam.found_inf = torch.zeros(())

    def step(self) -> None:
        """Clip, update, and forget the gradients."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        self._adam.grad_scale = (norm / GRADIENT_CLIP).clamp(min=1.0)  # the kernel divides by it
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


class DenseStep:
    """The dense BatchTopK step; under bf16 autocast its products, and with them its selection, are inexact."""

    def __init__(self, start: Start, *, autocast: bool = False) -> None:
        self.model, self._autocast = DenseModel(start), autocast
        self._adam = FusedAdam(list(self.model.parameters.values()))
        self._threshold = float(start.tensors["threshold"])

    def step(self, x: Tensor) -> None:
        """One update on raw rows."""
        self._finish(self._backward(x), len(x))

    def first_update(self, x: Tensor) -> FirstUpdate:
        """One update, with what it kept and its gradients."""
        kept = self._backward(x)
        gradients = self.model.gradients()
        self._finish(kept, len(x))
        return FirstUpdate(kept, gradients)

    def _backward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.normalised(x)
        with self._precision():
            pre = model.pre_activations(x)
            kept = self._kept(pre.detach() * model.gate)
            reconstruction = torch.addmm(model.bias, pre * kept, model.decoder)
        model.loss(x, reconstruction.float()).backward()
        return kept

    def _finish(self, kept: Tensor, num_rows: int) -> None:
        self._adam.step()
        self.model.refresh_gate()
        self.model.count(kept.any(0), num_rows)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self._autocast else nullcontext()

    def _kept(self, score: Tensor) -> Tensor:
        """The k·rows largest positive scores: the k-th of those above a cut that is lowered until they are enough."""
        count, cut = self.model.size.k * len(score), CUT * self._threshold
        candidates = score[score > cut]
        while len(candidates) < count and cut > 0:
            cut = cut / 2 if cut > 1e-3 * self._threshold else 0.0
            candidates = score[score > cut]
        if len(candidates) > count:
            self._threshold = float(candidates.kthvalue(len(candidates) - count + 1).values)
            return score >= self._threshold
        return score > cut


class _EncodeByIndexAdd(torch.autograd.Function):
    """Values of chosen pairs, whose gradients are gathered by index_add_."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, values: Tensor, latents: Tensor) -> Tensor:
        ctx.save_for_backward(x, latents)
        ctx.shape = encoder.shape
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        x, latents = ctx.saved_tensors
        grad, width = grad_outputs[0], ctx.shape[1]
        products = (grad.unsqueeze(2) * x.unsqueeze(1)).reshape(-1, width)
        encoder = x.new_zeros(ctx.shape).index_add_(0, latents.flatten(), products)
        bias = x.new_zeros(ctx.shape[0]).index_add_(0, latents.flatten(), grad.flatten())
        return None, encoder, bias, None, None


class TextbookStep:
    """The textbook sparse TopK step."""

    def __init__(self, start: Start) -> None:
        self.model = DenseModel(start)
        self._adam = torch.optim.Adam(list(self.model.parameters.values()), lr=LEARNING_RATE, fused=True)

    def step(self, x: Tensor) -> None:
        """One update on raw rows."""
        self._finish(self._backward(x), len(x))

    def first_update(self, x: Tensor) -> FirstUpdate:
        """One update, with what it kept and its gradients."""
        latents = self._backward(x)
        gradients = self.model.gradients()
        self._finish(latents, len(x))
        kept = torch.zeros(len(x), self.model.size.num_latents, dtype=torch.bool)
        return FirstUpdate(kept.scatter_(1, latents, True), gradients)

    def _backward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.normalised(x)
        with torch.no_grad():
            pre = model.pre_activations(x)
            latents = (pre * model.gate).topk(model.size.k, dim=1, sorted=False).indices
            found = pre.gather(1, latents)
        encoded: Any = _EncodeByIndexAdd.apply(x, model.encoder, model.encoder_bias, found, latents)
        values = torch.relu(encoded)
        reconstruction = embedding_bag(latents, model.decoder, per_sample_weights=values, mode="sum") + model.bias
        model.loss(x, reconstruction).backward()
        return latents

    def _finish(self, latents: Tensor, num_rows: int) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters.values(), GRADIENT_CLIP, foreach=True)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.model.refresh_gate()
        self.model.count(latents.flatten(), num_rows)
