"""The trainer: one update on packed raw activations, and the loop around it.

    L = Σ_{s written} ‖x̃_s − x̂̃_s‖² + λ(t) · sparsity + δ · delta + α · AuxK          (mean over rows; see losses.py)

Adam (β = 0.9, 0.999) on the gradient clipped to a norm. After each update the gate follows the decoder norms; the
threshold follows the batch's lowest kept score (moving average over about ten batches), and the dead are counted. A
step may be made of several micro-batches, whose gradients add up: BatchTopK then selects within each. Source dropout
hides a source from the encoder in some rows (sets `x̃_s := 0`, its mean) and reconstructs it all the same (functional
multi-site crosscoders, 2026); affine paths and AuxK see all. Which rows is a function of (seed, step), and nothing
else here is random: weights and stream decide every step, so a resumed run repeats the one it resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from xxhash import xxh3_64_intdigest

from crosscoder.activations import ActivationSource, Batch
from crosscoder.activity import Activity
from crosscoder.calibration import follow
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, NonFiniteActivations, SourceMismatch, TextError, TrainingDiverged
from crosscoder.groups import Columns
from crosscoder.nonlinearities import BatchTopK, active_per_row, check_budgets, scaled
from crosscoder.training import losses, schedules
from crosscoder.training.clipped_adam import ClippedAdam
from crosscoder.training.config import L1Sparsity, LossesConfig, NoSparsity, TanhSparsity, TrainConfig
from crosscoder.training.dead import DeadLatents
from crosscoder.training.dictionary_config import check_penalty
from crosscoder.training.losses import delta_pair

_log = logging.getLogger(__name__)
THRESHOLD_MEMORY = 0.9
AUX_ROWS = 4
"""AuxK uses every fourth row, and at most AUX_CANDIDATES dead latents a step."""
AUX_CANDIDATES = 512
CHECK_EVERY = 20
"""On a GPU, where looking at a loss waits for it, only every so many steps are checked, and before every checkpoint. A
step with a loss that is not finite leaves the weights as they were.
"""


@dataclass(frozen=True)
class StepResult:
    """What one update saw, before it: terms of the loss (means over rows), the gradient's norm, what was active."""

    loss: Float[Tensor, ""]
    source_errors: Float[Tensor, "sources"]
    sparsity: Float[Tensor, ""]
    delta: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    gradient_norm: Float[Tensor, ""]
    activities: Sequence[Activity]
    """One per micro-batch."""

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return sum(activity.num_rows for activity in self.activities)

    @property
    def num_active(self) -> Int[Tensor, ""]:
        """Active pairs of the step, on the device."""
        return torch.stack([activity.num_active for activity in self.activities]).sum()

    @property
    def code(self) -> SparseCode:
        """The code of all rows."""
        return SparseCode.below_each_other([activity.code for activity in self.activities])


class Hooks(Protocol):
    """What a run does beside the updates, at its own rhythm."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Called after every update."""
        ...


class Trainer:
    """Trains one crosscoder; `step` is one full update, `run` the loop."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        config: TrainConfig,
        *,
        sparsity: NoSparsity | L1Sparsity | TanhSparsity | None = None,
        losses: LossesConfig | None = None,
        seed: int = 0,
    ) -> None:
        if crosscoder.folded_normaliser:
            raise ConfigError("a folded crosscoder is for inference.", hint="Train the one it was folded from.")
        check_penalty(crosscoder.nonlinearity, sparsity or NoSparsity())
        self.crosscoder = crosscoder
        self.config = config.resolved(k=active_per_row(crosscoder.nonlinearity))
        self.sparsity = sparsity or NoSparsity()
        if self.config.k_start is not None:
            check_budgets(crosscoder.wiring, scaled(crosscoder.budgets, self.config.k_start))
        self.losses = losses or LossesConfig()
        if self.losses.delta is not None:
            delta_pair(crosscoder, *self.losses.delta.pair)
        self.aux = self.losses.aux
        self.seed = seed
        self.optimiser = ClippedAdam(crosscoder, learning_rate=config.learning_rate, clip=config.gradient_clip)
        crosscoder.precision, crosscoder.kernels = config.precision, config.kernels
        self.step_number = 0
        after = self.aux.dead_after_tokens or min(10_000_000, max(1, config.num_tokens // 20))
        self.dead = DeadLatents(crosscoder.num_latents, after_rows=after).to(crosscoder.bias.device)
        self._doubtful = 0
        if self.config.micro_batches > 1 and isinstance(crosscoder.nonlinearity, BatchTopK):
            _log.info("BatchTopK selects within each of the %d micro-batches of a step.", self.config.micro_batches)
        self.first_error: float | None = None
        """The reconstruction error of the first step, which divergence is judged by."""
        self._reads = Columns(crosscoder.sources, crosscoder.reads.keys)
        self._writes = Columns(crosscoder.sources, crosscoder.writes.keys)

    @property
    def _on_cpu(self) -> bool:
        return self.crosscoder.bias.device.type == "cpu"

    @property
    def num_steps(self) -> int:
        """Updates in the whole run."""
        return self.config.num_steps

    @property
    def k(self) -> int | None:
        """Active latents per row at this step, where the nonlinearity fixes them."""
        k = active_per_row(self.crosscoder.nonlinearity)
        steps = round(self.config.k_anneal_fraction * self.num_steps)
        return k and schedules.annealed_k(self.step_number, k=k, start=self.config.k_start, num_steps=steps)

    @property
    def learning_rate(self) -> float:
        """Adam's step size at this step."""
        factor = schedules.learning_rate_factor(
            self.step_number,
            num_steps=self.num_steps,
            warmup_steps=self.config.warmup_steps or 0,
            decay_steps=round(self.config.decay_fraction * self.num_steps),
        )
        return factor * self.config.learning_rate

    @property
    def sparsity_coefficient(self) -> float:
        """`λ` at this step."""
        if isinstance(self.sparsity, NoSparsity):
            return 0.0
        steps = round(self.sparsity.warmup_fraction * self.num_steps)
        return self.sparsity.coefficient * schedules.ramp(self.step_number, num_steps=steps)

    def run(self, source: ActivationSource, hooks: Sequence[Hooks] = ()) -> None:
        """Draw batches and update until the configured number of steps is reached."""
        for batch in self.draw(source):
            self.advance(batch, hooks)

    def advance(self, batch: Batch, hooks: Sequence[Hooks] = ()) -> None:
        """One update on a batch, looked at, and the hooks after it: what `run` does with every batch."""
        result = self.step(batch.x)
        if self._on_cpu or self.step_number % CHECK_EVERY == 0 or self.step_number == self.num_steps:
            self.check(result)
        for hook in hooks:
            hook.after_step(self, result)

    def step(self, x: Float[Tensor, "rows width"]) -> StepResult:
        """One update on raw activations packed over all sources of the crosscoder."""
        if not len(x):
            raise TextError("expected rows to train on; got an empty batch.")
        self.crosscoder.train()
        count = min(self.config.micro_batches, len(x))
        parts, masks = x.tensor_split(count), self._masks(len(x), parts=count)
        seen = [self._backward(*part, num_rows=len(x)) for part in zip(parts, masks, strict=True)]
        terms = torch.stack([len(part) / len(x) * terms for part, (terms, _) in zip(parts, seen, strict=True)]).sum(0)
        loss, sparsity, delta, auxiliary = terms[:4]
        gradient_norm = self._update(loss, x)
        self.step_number += 1
        activities = [activity for _, activity in seen]
        return StepResult(loss, terms[4:], sparsity, delta, auxiliary, gradient_norm, activities)

    def check(self, result: StepResult) -> None:
        """Raises TrainingDiverged when the error is ten times that of predicting zero and of the first step seen."""
        error = float(result.source_errors.sum())
        self.first_error = error if self.first_error is None else self.first_error
        zero = len(self.crosscoder.writes) * self.crosscoder.sources.width / len(self.crosscoder.sources)
        if error > 10 * max(zero, self.first_error):
            self._diverged(f"the reconstruction error is {error:.4g}", result.gradient_norm)
        self.check_updates()
        doubtful = sum(int(cut.doubtful) for cut in self.crosscoder.cuts if cut.doubtful is not None)
        if doubtful > self._doubtful:
            _log.warning("%d selections so far could not be shown to be exact.", doubtful)
            self._doubtful = doubtful

    def check_updates(self) -> None:
        """Raises TrainingDiverged if an update was left out on the device, as its loss or gradient was not finite."""
        if self.optimiser.skipped:
            raise TrainingDiverged(
                f"activations, loss or gradient were not finite in one of the last steps before {self.step_number}.",
                hint="Look at the activations with crosscoder evaluate, or lower train.learning_rate; weights are as "
                "they were before that step.",
            )

    def _diverged(self, what: str, gradient_norm: Tensor) -> NoReturn:
        first = "" if self.first_error is None else f"{self.first_error:.4g}"
        raise TrainingDiverged(
            f"{what} at step {self.step_number}.",
            details=[
                f"error at first {first}",
                f"learning rate  {self.learning_rate:.3g}",
                f"gradient norm  {float(gradient_norm):.3g}",
            ],
            hint="Start a new run (out=PATH) with a lower train.learning_rate or less sparsity; checkpoints stay.",
        )

    def draw(self, source: ActivationSource) -> Iterator[Batch]:
        """Batches from where the source stands, as many as updates are missing; raises SourceMismatch."""
        if source.sources != self.crosscoder.sources:
            raise SourceMismatch(
                "the activations are of other sources, or in another order, than the crosscoder's.",
                details=[
                    f"crosscoder   {', '.join(self.crosscoder.sources.keys)}",
                    f"activations  {', '.join(source.sources.keys)}",
                ],
                hint="Open the source of activations with sources=crosscoder.sources.",
            )
        batches = source.batches(self.config.batch_size)
        while self.step_number < self.num_steps:
            yield next(batches)

    def _masks(self, num_rows: int, *, parts: int) -> Sequence[Tensor | None]:
        """Which columns of the reads are seen in which rows, part by part, where the run hides some sources."""
        chance = self.losses.source_dropout
        if not chance:
            return [None] * parts
        widths = torch.tensor(self.crosscoder.reads.widths)
        key = xxh3_64_intdigest(f"dropout/{self.seed}/{self.step_number}".encode())
        generator = torch.Generator().manual_seed(key >> 1)
        kept = torch.rand(num_rows, len(widths), generator=generator) >= chance
        return kept.repeat_interleave(widths, dim=1).tensor_split(parts)

    def _backward(self, x: Tensor, mask: Tensor | None, *, num_rows: int) -> tuple[Float[Tensor, "terms"], Activity]:
        """Add the gradients of some rows; gives loss, sparsity, delta, auxiliary, and the errors of the sources."""
        normalised = self.crosscoder.normalise(x.to(self.crosscoder.bias.device, self.crosscoder.bias.dtype))
        reads, writes = self._reads(normalised), self._writes(normalised)
        seen = reads if mask is None else reads * mask.to(reads)
        activity = self.crosscoder.activity(seen, k=self.k)
        fit = self.crosscoder.fit(activity, reads, writes)
        zero = fit.total.new_zeros(())
        sparsity, delta = self._sparsity(activity, zero), self._delta(fit.error, zero)
        auxiliary = self._auxiliary(reads, fit.error)
        aux = zero if auxiliary is None else self.aux.coefficient * auxiliary.loss
        total = fit.total + sparsity + delta + aux
        (total if len(x) == num_rows else len(x) / num_rows * total).backward()
        if auxiliary is not None:
            auxiliary.add_gradients()
        self._follow(activity := activity.detach())
        return torch.cat([torch.stack([total, sparsity, delta, aux]).detach(), fit.source_errors]), activity

    def _sparsity(self, activity: Activity, zero: Tensor) -> Tensor:
        if isinstance(self.sparsity, NoSparsity):
            return zero
        return losses.sparsity(activity, self.crosscoder, self.sparsity, coefficient=self.sparsity_coefficient)

    def _delta(self, error: Tensor, zero: Tensor) -> Tensor:
        delta = self.losses.delta
        return zero if delta is None else delta.coefficient * losses.delta(error, self.crosscoder, a=delta.a, b=delta.b)

    def _auxiliary(self, reads: Tensor, error: Tensor) -> losses.Auxiliary | None:
        """AuxK of some of the dead latents on some of the rows, if any are dead."""
        if not self.aux.coefficient:
            return None
        if self._on_cpu:
            dead, among = self.dead.taking_turns(self.step_number, at_most=AUX_CANDIDATES), None
        else:
            dead, among = self.dead.without_waiting(self.step_number, at_most=AUX_CANDIDATES)
        rows = slice(self.step_number % AUX_ROWS, None, AUX_ROWS)
        if not dead.numel() or not len(error[rows]):
            return None
        k_aux = self.aux.max_latents or max(1, error.shape[1] // len(self.crosscoder.writes) // 2)
        return losses.auxiliary(self.crosscoder, reads[rows], error[rows], dead=dead, k_aux=k_aux, among=among)

    def _update(self, loss: Tensor, x: Tensor) -> Tensor:
        norm = self.optimiser.norm()
        if loss.device.type == "cpu" and not bool(torch.isfinite(loss + norm)):  # before the weights are touched
            self._refuse(x)
            self._diverged(f"the loss is {float(loss):.4g}", norm)
        self.crosscoder.settle(self.optimiser.update(norm, loss=loss, learning_rate=self.learning_rate))
        return norm

    def _refuse(self, x: Tensor) -> None:
        """Raises NonFiniteActivations for rows that hold NaN or infinity."""
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteActivations(
                f"the activations of step {self.step_number} hold NaN or infinity.",
                details=_broken(self.crosscoder, x),
                hint="Load the model in float32 or bfloat16, and look at the text of that batch.",
            )

    @torch.no_grad()
    def _follow(self, activity: Activity) -> None:
        """Let dead counts and the inference threshold follow what this batch kept."""
        self.dead.update(activity)
        if isinstance(self.crosscoder.nonlinearity, BatchTopK):
            memory = THRESHOLD_MEMORY ** (1 / self.config.micro_batches)
            follow(self.crosscoder, activity.groups, memory=memory)


def _broken(crosscoder: Crosscoder, x: Tensor) -> list[str]:
    parts = crosscoder.sources.unpack(x)
    counts = {key: int((~torch.isfinite(part)).any(1).sum()) for key, part in parts.items()}
    return [f"{key}  {count} of {x.shape[0]} rows" for key, count in counts.items() if count]
