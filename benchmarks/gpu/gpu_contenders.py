"""What our step is compared with on a GPU: the same loss and optimiser in plain torch operations.

`DenseStep`     five bf16 products. Selection is a running threshold on p · gate: a multiplicative controller holds the
                mean number of active latents at k, which is cheaper than any exact BatchTopK, and sorts nothing.
                Optimiser: fused Adam on fp32 masters with the clip folded in; bf16 copies are refreshed after it.
`TextbookStep`  per-row TopK by `torch.topk`, `embedding_bag` for decoding and its own gradients, and `index_add` for
                the encoder's gradient, with the (rows · k, width) matrix that this takes. Optimiser: fused Adam after
                `clip_grad_norm_`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Mark = Callable[[str], None]


class DenseStep:
    """A dense bf16 step: everything is a product of full matrices."""

    def __init__(self, encoder: Tensor, decoder: Tensor, *, widths: tuple[int, ...], k: int) -> None:
        self.widths, self.k, self.max_norm = widths, k, 1.0
        bias = (encoder.new_zeros(len(encoder)), decoder.new_zeros(decoder.shape[1]))
        self.weights = [torch.nn.Parameter(w) for w in (encoder, bias[0], decoder, bias[1])]
        self.copies = [encoder.bfloat16(), decoder.bfloat16()]
        self.optimiser = torch.optim.Adam(self.weights, lr=1e-4, fused=True)
        self.threshold = encoder.new_full((), 1.0)

    @torch.no_grad()
    def __call__(self, x: Tensor, mark: Mark = lambda _: None) -> Tensor:
        """One update; gives the loss."""
        _, bias, decoder, offset = self.weights
        encoder16, decoder16 = self.copies
        x16 = x.bfloat16()
        pre = torch.addmm(bias.bfloat16(), x16, encoder16.T)
        norms = torch.stack([part.norm(dim=1) for part in decoder.split(self.widths, dim=1)])
        keep = pre > (self.threshold / norms.sum(0)).bfloat16()
        self.threshold *= (keep.sum() / (self.k * len(x))).clamp(0.25, 4.0) ** 0.1
        f = pre * keep
        mark("encoder product and selection")
        error = x - offset - (f @ decoder16)
        slope = (-2 / len(x)) * error
        slope16 = slope.bfloat16()
        of_code = (slope16 @ decoder16.T) * keep
        mark("decode and code gradients")
        of_bias = of_code.sum(0, dtype=torch.float32)
        gradients = [_product(of_code.T, x16), of_bias, _product(f.T, slope16), slope.sum(0)]
        mark("weight gradients")
        self._update(gradients)
        mark("optimiser")
        return error.square().sum() / len(x)

    def _update(self, gradients: list[Tensor]) -> None:
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.optimiser.grad_scale = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)  # pyright: ignore
        self.optimiser.found_inf = (~norm.isfinite()).float()  # pyright: ignore
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.copies[0].copy_(self.weights[0])
        self.copies[1].copy_(self.weights[2])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The bf16 product, written as fp32: at once, where this torch can do that."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and _writes_fp32() else (a @ b).float()


@cache
def _writes_fp32() -> bool:
    small = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        torch.mm(small, small, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


class _TextbookEncode(torch.autograd.Function):
    """The k largest pre-activations of every row; the encoder's gradient by `index_add`."""

    @staticmethod
    def forward(ctx, x, encoder, bias, copy, k):  # pyright: ignore
        pre = torch.addmm(bias.to(copy.dtype), x.to(copy.dtype), copy.T)
        values, latents = pre.topk(k, dim=1, sorted=False)
        ctx.save_for_backward(x, latents, encoder)
        ctx.mark_non_differentiable(latents)
        return values.float().relu(), latents

    @staticmethod
    def backward(ctx, grad, _):  # pyright: ignore
        x, latents, encoder = ctx.saved_tensors
        rows = (grad[:, :, None] * x[:, None, :]).view(-1, x.shape[1])
        gradient = torch.zeros_like(encoder).index_add_(0, latents.flatten(), rows)
        of_bias = torch.zeros_like(encoder[:, 0]).index_add_(0, latents.flatten(), grad.flatten())
        return None, gradient, of_bias, None, None


class TextbookStep:
    """A sparse step as it is usually written."""

    def __init__(self, encoder: Tensor, decoder: Tensor, *, widths: tuple[int, ...], k: int) -> None:
        del widths
        self.k = k
        bias = (encoder.new_zeros(len(encoder)), decoder.new_zeros(decoder.shape[1]))
        self.weights = [torch.nn.Parameter(w) for w in (encoder, bias[0], decoder, bias[1])]
        self.copy = encoder.bfloat16()
        self.optimiser = torch.optim.Adam(self.weights, lr=1e-4, fused=True)

    def __call__(self, x: Tensor, mark: Mark = lambda _: None) -> Tensor:
        """One update; gives the loss."""
        encoder, bias, decoder, offset = self.weights
        values, latents = _TextbookEncode.apply(x, encoder, bias, self.copy, self.k)  # pyright: ignore
        values = values * (values > 0)
        mark("encoder product and selection")
        error = x - offset - embedding_bag(latents, decoder, per_sample_weights=values, mode="sum")
        loss = error.square().sum() / len(x)
        mark("decode")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0, foreach=True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.copy.copy_(encoder.detach())
        mark("optimiser")
        return loss.detach()
