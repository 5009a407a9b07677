"""The trainer on a world's rows: made, trained for a while, with a tenth of its latents dead, and watched at work.

Nothing of a step is repeated here: the parts of it that are timed or looked at are the trainer's own, wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_worlds import World
from torch import Tensor
from torch.nn.functional import normalize

import crosscoder as xc
from crosscoder.kernels import dispatch
from crosscoder.kernels.triton.backend import TRITON
from crosscoder.training.config import AuxConfig, LossesConfig
from crosscoder.training.trainer import AUX_CANDIDATES, StepResult

NUM_TOKENS = 1 << 40
DEAD_EVERY = 10
SHORT = 1e-3
LONG_AGO = 1 << 40
AUX = LossesConfig(aux=AuxConfig(max_latents=AUX_CANDIDATES))
"""AuxK in which every dead latent of a step's turn takes part, so that which do is not a matter of rounding."""
PHASES = {
    "activity": ("normalise", "crosscoder.activity"),
    "fit": (None, "crosscoder.fit"),
    "backward": ("AuxK, forwards", "backward"),
    "norm": ("AuxK's gradients, threshold, dead counts", "gradient norm"),
    "update": (None, "optimiser.update"),
    "settle": (None, "settle"),
}
"""The parts of a step in their order: what came before one, and its own name."""


@dataclass(frozen=True)
class Weights:
    """Where training begins, in normalised space."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    bias: Tensor

    @classmethod
    def fresh(cls, world: World) -> Weights:
        """Decoder rows of norm 0.3, the encoder alike."""
        size, like = world.size, world.directions
        drawn = torch.randn(size.num_latents, size.width, generator=world.generator, device=like.device)
        decoder = 0.3 * normalize(drawn, dim=1)
        return cls(decoder, like.new_zeros(size.num_latents), decoder, like.new_zeros(size.width))

    @classmethod
    def of(cls, trainer: xc.Trainer) -> Weights:
        """Copies of a trainer's present weights."""
        return cls(**{name: parameter.detach().clone() for name, parameter in parameters(trainer).items()})


@dataclass(frozen=True)
class Seen:
    """What one step gave, and on its way: the error, and the gradients before the clip."""

    result: StepResult
    error: Tensor
    gradients: dict[str, Tensor]


@contextmanager
def on_triton(device: str) -> Iterator[None]:
    """Within it the trainer does on the CPU what it does on a GPU, for a dry run; on a GPU it does so by itself."""

    def always(like: Tensor, kernels: str) -> dispatch.Backend:
        return TRITON

    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(patch.object(dispatch, "backend", always))
            stack.enter_context(patch.object(xc.Trainer, "_on_cpu", False))  # dead latents without their number
        yield


def trainer(
    world: World, weights: Weights | None = None, *, learning_rate: float = 1e-3, losses: LossesConfig | None = None
) -> xc.Trainer:
    """A trainer of one acausal group with those weights, or with fresh ones."""
    size, device = world.size, world.directions.device
    sources = xc.SourceSet([xc.Source(f"model{i}", "layers.0.resid_post", w) for i, w in enumerate(size.widths)])
    cc = xc.Crosscoder(xc.wiring.acausal(sources, num_latents=size.num_latents), xc.BatchTopK(k=size.k), seed=None)
    config = xc.TrainConfig(
        num_tokens=NUM_TOKENS,
        batch_size=size.rows,
        learning_rate=learning_rate,
        warmup_steps=1,
        precision="auto" if device.type == "cuda" else "mixed",  # what is tiny would not be proposed in bf16
    )
    made = xc.Trainer(cc.to(device), config, losses=losses)
    assert cc.backend is TRITON, "the trainer's kernels are Triton's here"
    start = weights or Weights.fresh(world)
    with torch.no_grad():
        for name, parameter in parameters(made).items():
            parameter.copy_(getattr(start, name))
    cc.settle()
    return made


def trained(world: World, *, steps: int, dead: bool = False, losses: LossesConfig | None = None) -> xc.Trainer:
    """A trainer that has taken some steps, in the last three of which a tenth of its latents were dead if asked for."""
    made, last = trainer(world, losses=losses), min(3, steps - 1) if dead else 0
    for _ in range(steps - last):
        made.step(world.rows())
    if dead:
        silence(made)
    for _ in range(last):
        made.step(world.rows())
    return made


@torch.no_grad()
def silence(trainer: xc.Trainer) -> None:
    """Make every tenth latent one that has not fired for long, with an encoder too short to fire now."""
    dead, own = slice(None, None, DEAD_EVERY), trainer.crosscoder.weights[0]
    own.encoder[dead] *= SHORT
    own.encoder_bias[dead] *= SHORT
    trainer.dead.rows_since_fired[dead] = LONG_AGO


def parameters(trainer: xc.Trainer) -> dict[str, torch.nn.Parameter]:
    """The trained tensors by name."""
    own = trainer.crosscoder.weights[0]
    named = {"encoder": own.encoder, "encoder_bias": own.encoder_bias, "decoder": own.decoder}
    return named | {"bias": trainer.crosscoder.bias}


@contextmanager
def watched(trainer: xc.Trainer, enter: Callable[[str], None], leave: Callable[[str, Any], None]) -> Iterator[None]:
    """Within it, `enter` is told before every part of a step that PHASES names, `leave` after it, with its result."""
    cc, optimiser = trainer.crosscoder, trainer.optimiser
    owners = (cc, cc, torch.Tensor, optimiser, optimiser, cc)

    def wrapped(part: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            enter(name)
            result = part(*args, **kwargs)
            leave(name, result)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in zip(owners, PHASES, strict=True):
            stack.enter_context(patch.object(owner, name, wrapped(getattr(owner, name), name)))
        yield


def seen(trainer: xc.Trainer, x: Tensor) -> Seen:
    """One step, looked at."""
    errors: list[Tensor] = []
    gradients: dict[str, Tensor] = {}

    def leave(name: str, result: Any) -> None:
        if name == "fit":
            errors.append(result.error.detach().clone())
        if name == "norm":
            found = {key: parameter.grad for key, parameter in parameters(trainer).items()}
            gradients.update({key: gradient.clone() for key, gradient in found.items() if gradient is not None})

    with watched(trainer, lambda name: None, leave):
        result = trainer.step(x)
    (error,) = errors
    return Seen(result, error, gradients)


class TimedStep:
    """A trainer's step that tells when its phases end."""

    def __init__(self, trainer: xc.Trainer) -> None:
        self.trainer = trainer

    def __call__(self, x: Tensor, mark: Callable[[str], None] = lambda name: None) -> None:
        """One update."""

        def enter(name: str) -> None:
            before, _ = PHASES[name]
            if before is not None:
                mark(before)

        with watched(self.trainer, enter, lambda name, _: mark(PHASES[name][1])):
            self.trainer.step(x)
