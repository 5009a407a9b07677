"""A step of the trainer against fp64: which pairs are kept, error, loss, gradients, and the state after the update.

    f = p · kept      e = x − b_dec − f W      L = Σ ‖e‖² / rows  +  α Σ ‖e − relu(p_dead) W_dead‖² / rows'

with e of the second term constant, on every fourth row, over the dead latents whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gpu_trainer
import torch
from gpu_trainer import Seen
from torch import Tensor

import crosscoder as xc
from crosscoder.codes import SparseCode
from crosscoder.kernels.triton.patterns import PaddedPattern
from crosscoder.training.trainer import AUX_CANDIDATES, AUX_ROWS, THRESHOLD_MEMORY

TIE = 1e-6
SAMPLED = 48
BLOCK = 8192


@dataclass(frozen=True)
class Comparison:
    """How far something is from fp64, and how far it may be."""

    what: str
    value: float
    bound: float


@dataclass(frozen=True)
class Before:
    """A trainer before a step, copied."""

    weights: dict[str, Tensor]
    gate: Tensor
    threshold: Tensor
    rows_since_fired: Tensor
    dead: Tensor
    """The dead latents whose turn in AuxK it is."""
    step: int
    learning_rate: float

    @classmethod
    def of(cls, trainer: xc.Trainer) -> Before:
        """The present state, but for the moments."""
        own = trainer.crosscoder.weights[0]
        return cls(
            {name: parameter.detach().clone() for name, parameter in gpu_trainer.parameters(trainer).items()},
            own.gate.clone(),
            own.threshold.clone(),
            trainer.dead.rows_since_fired.clone(),
            trainer.dead.taking_turns(trainer.step_number, at_most=AUX_CANDIDATES),
            trainer.step_number,
            trainer.learning_rate,
        )


@dataclass(frozen=True)
class Exact:
    """What a step computes, in fp64."""

    error: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    @property
    def norm(self) -> Tensor:
        """The norm of the gradient."""
        return torch.stack([gradient.square().sum() for gradient in self.gradients.values()]).sum().sqrt()


def against_dense(trainer: xc.Trainer, x: Tensor) -> Iterator[Comparison]:
    """One update against all of it in fp64."""
    before, moments = Before.of(trainer), _moments(trainer)
    seen = gpu_trainer.seen(trainer, x)
    code = seen.result.activities[0].groups[0]
    chosen = torch.zeros(len(x), len(before.gate), dtype=torch.bool, device=x.device)
    chosen[code.pattern.row_ids[_valid(code)], code.latents[_valid(code)]] = True
    w = {name: weight.double() for name, weight in before.weights.items()}
    pre = x.double() @ w["encoder"].T + w["encoder_bias"]
    yield from _selected(trainer, before, code, chosen=chosen, scores=pre * before.gate)
    yield Comparison("values", relative(code.to_dense(), pre * chosen), 1e-5)
    exact = exactly(trainer, before, w, x=x.double(), pre=pre, chosen=chosen)
    yield from _gradients(seen, exact, before.dead)
    for name, gradient in exact.gradients.items():
        expected = updated(w[name], gradient, moments[name], norm=exact.norm, before=before, trainer=trainer)
        got = gpu_trainer.parameters(trainer)[name].detach() - w[name]
        yield Comparison(f"update of {name}", relative(got, expected - w[name]), 1e-3)
    yield from _settled(trainer, before, code, fired=chosen.any(0), rows=len(x))


def on_samples(trainer: xc.Trainer, x: Tensor) -> Iterator[Comparison]:
    """One step against fp64 on a few rows and latents; none may be dead."""
    before = Before.of(trainer)
    assert not len(before.dead), "the gradients of AuxK are not among what is looked at here"
    seen = gpu_trainer.seen(trainer, x)
    code, w = seen.result.activities[0].groups[0], before.weights
    rows = torch.linspace(0, len(x) - 1, SAMPLED, device=x.device).long().unique()
    pre = torch.cat([x[rows].double() @ part.double().T for part in w["encoder"].split(BLOCK)], dim=1)
    pre += w["encoder_bias"]
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    place = torch.searchsorted(rows, code.pattern.row_ids).clamp(max=len(rows) - 1)
    here = _valid(code) & (rows[place] == code.pattern.row_ids)
    chosen[place[here], code.latents[here]] = True
    yield from _selected(trainer, before, code, chosen=chosen, scores=pre * before.gate)
    parts = zip((pre * chosen).split(BLOCK, dim=1), w["decoder"].split(BLOCK), strict=True)
    y = torch.stack([part @ decoder.double() for part, decoder in parts]).sum(0)
    yield Comparison("error", relative(seen.error[rows], x[rows].double() - w["bias"] - y), 1e-5)
    yield _latents(seen, before, code, x)


def exactly(
    trainer: xc.Trainer, before: Before, w: dict[str, Tensor], *, x: Tensor, pre: Tensor, chosen: Tensor
) -> Exact:
    """Error, loss and gradients, given which pairs are kept; all arguments in fp64."""
    f = pre * chosen
    error = x - w["bias"] - f @ w["decoder"]
    slope = -2 / len(x) * error
    of_code = (slope @ w["decoder"].T) * chosen
    gradients = {"encoder": of_code.T @ x, "encoder_bias": of_code.sum(0), "decoder": f.T @ slope, "bias": slope.sum(0)}
    loss = error.square().sum() / len(x)
    if len(before.dead):
        rows = slice(before.step % AUX_ROWS, None, AUX_ROWS)
        loss = loss + _add_auxiliary(
            gradients, w, before.dead, x=x[rows], error=error[rows], aux=trainer.aux.coefficient
        )
    return Exact(error, loss, gradients)


def updated(
    w: Tensor, gradient: Tensor, moments: list[Tensor], *, norm: Tensor, before: Before, trainer: xc.Trainer
) -> Tensor:
    """Adam in fp64, on a gradient clipped to the norm."""
    clipped, number = gradient / ((norm + 1e-6) / trainer.config.gradient_clip).clamp(min=1), before.step + 1
    m = 0.9 * moments[0] + 0.1 * clipped
    v = 0.999 * moments[1] + 0.001 * clipped**2
    return w - before.learning_rate * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _add_auxiliary(
    gradients: dict[str, Tensor], w: dict[str, Tensor], dead: Tensor, *, x: Tensor, error: Tensor, aux: float
) -> Tensor:
    """AuxK of the latents `dead` on some rows; its gradients are added."""
    leaves = {name: w[name][dead].requires_grad_() for name in ("encoder", "encoder_bias", "decoder")}
    f = torch.relu(x @ leaves["encoder"].T + leaves["encoder_bias"])
    loss = aux * (error - f @ leaves["decoder"]).square().sum() / len(x)
    found = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        gradients[name][dead] += gradient
    return loss.detach()


def _valid(code: SparseCode) -> Tensor:
    """Which entries of a code are active pairs."""
    assert isinstance(code.pattern, PaddedPattern), "a selection of Triton's pads"
    return code.pattern.valid


def _moments(trainer: xc.Trainer) -> dict[str, list[Tensor]]:
    state, named = trainer.optimiser.state, gpu_trainer.parameters(trainer)
    return {name: [state[p][key].double() for key in ("exp_avg", "exp_avg_sq")] for name, p in named.items()}


def _lowest(code: SparseCode, gate: Tensor) -> Tensor:
    """The lowest score that was kept."""
    scores = code.values.double() * gate.double()[code.latents]
    return torch.where(_valid(code), scores, torch.inf).amin()


def _selected(
    trainer: xc.Trainer, before: Before, code: SparseCode, *, chosen: Tensor, scores: Tensor
) -> Iterator[Comparison]:
    """How many pairs are on the wrong side of the lowest kept score, ties aside, and how many there are too few."""
    threshold = _lowest(code, before.gate)
    clear = (scores - threshold).abs() > TIE * threshold
    yield Comparison("pairs on the wrong side", float(((scores > threshold) != chosen)[clear].sum()), 0.0)
    missing = (trainer.k or 0) * code.num_rows - int(code.row_pointers[-1])
    yield Comparison("pairs missing", float(abs(missing)), 0.0)
    doubtful = sum(int(cut.doubtful) for cut in trainer.crosscoder.cuts if cut.doubtful is not None)
    yield Comparison("selections in doubt so far", float(doubtful), 0.0)


def _gradients(seen: Seen, exact: Exact, dead: Tensor) -> Iterator[Comparison]:
    yield Comparison("error", relative(seen.error, exact.error), 1e-5)
    yield Comparison("loss", relative(seen.result.loss, exact.loss), 1e-5)
    for name, gradient in exact.gradients.items():
        yield Comparison(f"gradient of {name}", relative(seen.gradients[name], gradient), 1e-5)
        if len(dead) and name != "bias":
            what = f"gradient of {name}, {len(dead)} dead latents"
            yield Comparison(what, relative(seen.gradients[name][dead], gradient[dead]), 1e-5)
    yield Comparison("gradient norm", relative(seen.result.gradient_norm, exact.norm), 1e-5)


def _settled(
    trainer: xc.Trainer, before: Before, code: SparseCode, *, fired: Tensor, rows: int
) -> Iterator[Comparison]:
    """What follows the weights and the codes: the bf16 copy, the gate, the inference threshold, the dead counts."""
    own = trainer.crosscoder.weights[0]
    copy = own.rounded_in_place
    assert copy is not None, "the optimiser's pass writes the copy that the next step proposes with"
    away = copy.float() - own.encoder.detach().bfloat16().float()
    yield Comparison("bf16 copy", float(away.abs().max()), 0.0)
    parts = own.decoder.detach().double().split(list(trainer.crosscoder.writes.widths), dim=1)
    yield Comparison("gate", relative(own.gate, torch.stack([part.norm(dim=1) for part in parts]).sum(0)), 1e-5)
    followed = THRESHOLD_MEMORY * before.threshold + (1 - THRESHOLD_MEMORY) * _lowest(code, before.gate)
    yield Comparison("threshold", relative(own.threshold, followed), 1e-5)
    counts = torch.where(fired, 0, before.rows_since_fired + rows)
    yield Comparison("dead counts that differ", float((trainer.dead.rows_since_fired != counts).sum()), 0.0)


def _latents(seen: Seen, before: Before, code: SparseCode, x: Tensor) -> Comparison:
    """The gradients of the most active and of some other latents, summed over their pairs in fp64."""
    w, counts = before.weights, code.pattern.latent_pointers.diff()
    spread = torch.linspace(0, len(counts) - 1, SAMPLED, device=x.device).long()
    latents = torch.cat([counts.topk(4).indices, spread])
    got: list[Tensor] = []
    expected: list[Tensor] = []
    for i in latents.tolist():
        rows = code.pattern.row_ids[(_valid(code) & (code.latents == i)).nonzero().view(-1)]
        error, row = seen.error[rows].double(), w["decoder"][i].double()
        value = x[rows].double() @ w["encoder"][i].double() + w["encoder_bias"][i]
        slope = -2 / len(x)
        expected.append(torch.cat([slope * (error @ row) @ x[rows].double(), slope * value @ error]))
        got.append(torch.cat([seen.gradients["encoder"][i], seen.gradients["decoder"][i]]))
    what = f"gradients of {len(latents)} latents"
    return Comparison(what, relative(torch.stack(got), torch.stack(expected)), 1e-5)
