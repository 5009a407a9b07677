"""A step of ours against fp64: which pairs are selected, error, loss, gradients and the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_sparse_step import NAMES, Outcome, SparseStep
from torch import Tensor

from crosscoder.kernels.triton.patterns import Selected

TIE = 1e-6
SAMPLED = 48


@dataclass(frozen=True)
class Comparison:
    """How far something is from fp64, and how far it may be."""

    what: str
    value: float
    bound: float


def against_dense(step: SparseStep, x: Tensor) -> Iterator[Comparison]:
    """One update against all of it in fp64; the weights are changed."""
    w = {name: weight.double() for name, weight in step.weights.items()}
    gate, moments = step.gate.double(), {name: [m.double() for m in pair] for name, pair in step.moments.items()}
    outcome = step.gradients(x)
    kept = outcome.selection.groups[0]
    chosen = torch.zeros(len(x), len(gate), dtype=torch.bool, device=x.device)
    chosen[kept.pattern.row_ids[kept.pattern.valid], kept.pattern.latents[kept.pattern.valid]] = True
    pre = x.double() @ w["encoder"].T + w["encoder_bias"]
    yield from _selected(outcome, step, chosen, pre * gate)
    f, rows = pre * chosen, len(x)
    error = x.double() - w["bias"] - f @ w["decoder"]
    of_code = -2 / rows * (error @ w["decoder"].T) * chosen
    slope = -2 / rows * error
    exact = (of_code.T @ x.double(), of_code.sum(0), f.T @ slope, slope.sum(0))
    yield Comparison("error", relative(outcome.left.error, error), 1e-5)
    yield Comparison("loss", relative(outcome.loss, error.square().sum() / rows), 1e-5)
    for name, gradient in zip(NAMES, exact, strict=True):
        yield Comparison(f"gradient of {name}", relative(outcome.gradients[name], gradient), 1e-5)
    norm = torch.stack([gradient.square().sum() for gradient in exact]).sum().sqrt()
    yield Comparison("gradient norm", relative(outcome.norm, norm), 1e-5)
    step.update(outcome)
    for name, gradient in zip(NAMES, exact, strict=True):
        expected = updated(w[name], gradient, moments[name], norm=norm, step=step)
        yield Comparison(f"update of {name}", relative(step.weights[name] - w[name], expected - w[name]), 1e-3)
    shadow = step.weights["encoder"].bfloat16()
    yield Comparison("bf16 copy", float((step.shadow.float() - shadow.float()).abs().max()), 0.0)
    parts = step.weights["decoder"].double().split(step.widths, dim=1)
    norms = torch.stack([part.norm(dim=1) for part in parts]).sum(0)
    yield Comparison("gate", relative(step.gate, norms), 1e-5)


def on_samples(step: SparseStep, x: Tensor) -> Iterator[Comparison]:
    """One step against fp64 on a few rows and latents."""
    w = step.weights
    outcome = step.gradients(x)
    kept = outcome.selection.groups[0]
    rows = torch.linspace(0, len(x) - 1, SAMPLED, device=x.device).long().unique()
    pre = torch.cat([x[rows].double() @ part.double().T for part in w["encoder"].split(8192)], dim=1)
    scores = (pre + w["encoder_bias"]) * step.gate
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    place = torch.searchsorted(rows, kept.pattern.row_ids).clamp(max=len(rows) - 1)
    here = kept.pattern.valid & (rows[place] == kept.pattern.row_ids)
    chosen[place[here], kept.pattern.latents[here]] = True
    yield from _selected(outcome, step, chosen, scores)
    f = (pre + w["encoder_bias"]) * chosen
    parts = zip(f.split(8192, dim=1), w["decoder"].split(8192), strict=True)
    y = torch.stack([part @ decoder.double() for part, decoder in parts]).sum(0)
    yield Comparison("error", relative(outcome.left.error[rows], x[rows].double() - w["bias"] - y), 1e-5)
    yield from _latents(step, outcome, kept, x)


def updated(w: Tensor, gradient: Tensor, moments: list[Tensor], *, norm: Tensor, step: SparseStep) -> Tensor:
    """Adam in fp64, on a gradient clipped to the norm."""
    number = int(step.number)
    clipped = gradient / ((norm + 1e-6) / step.max_norm).clamp(min=1)
    m = 0.9 * moments[0] + 0.1 * clipped
    v = 0.999 * moments[1] + 0.001 * clipped**2
    return w - step.learning_rate * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _selected(outcome: Outcome, step: SparseStep, chosen: Tensor, scores: Tensor) -> Iterator[Comparison]:
    """How many pairs are on the wrong side of the threshold, ties aside; and the number kept."""
    found, threshold = outcome.selection, outcome.selection.threshold.double()
    clear = (scores - threshold).abs() > TIE * threshold
    yield Comparison("pairs on the wrong side", float(((scores > threshold) != chosen)[clear].sum()), 0.0)
    kept = found.groups[0].pattern
    wanted = step.k * kept.num_rows
    missing = wanted - int(kept.row_pointers[-1]) if float(threshold) > 0 else 0
    yield Comparison("pairs missing", float(missing), 0.0)
    yield Comparison("selection in doubt", float(found.broken), 0.0)


def _latents(step: SparseStep, outcome: Outcome, kept: Selected, x: Tensor) -> Iterator[Comparison]:
    """The gradients of some latents, summed over their pairs in fp64."""
    w, valid = step.weights, kept.pattern.valid
    counts = kept.pattern.latent_pointers.diff()
    latents = torch.cat([counts.topk(4).indices, torch.linspace(0, len(counts) - 1, SAMPLED, device=x.device).long()])
    got: list[Tensor] = []
    expected: list[Tensor] = []
    for i in latents.tolist():
        pairs = (valid & (kept.pattern.latents == i)).nonzero().view(-1)
        rows = kept.pattern.row_ids[pairs]
        error, row = outcome.left.error[rows].double(), w["decoder"][i].double()
        value = x[rows].double() @ w["encoder"][i].double() + w["encoder_bias"][i]
        slope = -2 / len(x)
        expected.append(torch.cat([slope * (error @ row) @ x[rows].double(), slope * value @ error]))
        got.append(torch.cat([outcome.gradients["encoder"][i], outcome.gradients["decoder"][i]]))
    yield Comparison(f"gradients of {len(latents)} latents", relative(torch.stack(got), torch.stack(expected)), 1e-5)
