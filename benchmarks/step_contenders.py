"""Who takes part: our trainer in its variants, what it is compared with, and peers where they are installed.

To add a variant of ours, add a line to VARIANTS: its nonlinearity and what its `TrainConfig` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import step_peers
from step_data import Start
from step_dense import GRADIENT_CLIP, LEARNING_RATE, LONG_AGO, NAMES, DenseStep, FirstUpdate, TextbookStep
from torch import Tensor

from crosscoder.nonlinearities import BatchTopK, TopK
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer

BETA1 = 0.9
NO_CLIPPING = 1e30
NUM_TOKENS = 1 << 40
BASELINE = "ours"


class Contender(Protocol):
    """Something that trains."""

    def step(self, x: Tensor) -> object:
        """One full update on raw packed rows."""
        ...


class Checked(Contender, Protocol):
    """A contender that shows what its first update kept, and with which gradients."""

    def first_update(self, x: Tensor) -> FirstUpdate:
        """One update on raw packed rows."""
        ...


@dataclass(frozen=True)
class Ours:
    """A variant of our trainer."""

    nonlinearity: type[BatchTopK | TopK] = BatchTopK
    train: dict[str, Any] = field(default_factory=dict[str, Any])


VARIANTS = {
    BASELINE: Ours(),
    "ours, TopK": Ours(TopK),
    "ours, float32": Ours(train={"precision": "float32"}),
}
OURS = {name: ours for name, ours in VARIANTS.items() if set(ours.train) <= set(TrainConfig.model_fields)}
PEERS: dict[str, Callable[[Start], Contender]] = {
    "sparsify TopK": step_peers.Sparsify,
    "sae-lens TopK": partial(step_peers.SaeLens, kind="topk"),
    "sae-lens TopK, sparse": partial(step_peers.SaeLens, kind="topk-sparse"),
    "sae-lens BatchTopK": partial(step_peers.SaeLens, kind="batchtopk"),
}
CHECKED: dict[str, Callable[[Start], Checked]] = {
    **{name: partial(lambda start, of: OurStep(start, of, clip=NO_CLIPPING), of=ours) for name, ours in OURS.items()},
    "dense": DenseStep,
    "textbook TopK": TextbookStep,
}
"""As they are checked: ours without clipping, since its gradients are read from Adam's moments."""
CONTENDERS: dict[str, Callable[[Start], Contender]] = {
    **CHECKED,
    **{name: partial(lambda start, of: OurStep(start, of), of=ours) for name, ours in OURS.items()},
    "dense, bf16 (inexact)": partial(DenseStep, autocast=True),
    **PEERS,
}
PER_ROW = ("ours, TopK", "textbook TopK")
"""Those of CHECKED that select in each row; the others select over the batch."""


class OurStep:
    """`Trainer.step`, on the trained weights."""

    def __init__(self, start: Start, of: Ours, *, clip: float = GRADIENT_CLIP) -> None:
        size = start.size
        config = TrainConfig(
            num_tokens=NUM_TOKENS,
            batch_size=size.batch_size,
            learning_rate=LEARNING_RATE,
            gradient_clip=clip,
            **of.train,
        )
        self.trainer = Trainer(start.crosscoder(of.nonlinearity(size.k)), config)
        self.trainer.dead.rows_since_fired[start.dead] = LONG_AGO

    def step(self, x: Tensor) -> None:
        """One full update through the public surface."""
        self.trainer.step(x)

    def first_update(self, x: Tensor) -> FirstUpdate:
        """The first update, without clipping: Adam's first moment is then (1 − β₁) of the gradient."""
        code, crosscoder = self.trainer.step(x).code, self.trainer.crosscoder
        own, moments = crosscoder.weights[0], self.trainer.optimiser.state
        parameters = dict(zip(NAMES, (own.encoder, own.encoder_bias, own.decoder, crosscoder.bias), strict=True))
        gradients = {name: moments[p]["exp_avg"].reshape(p.shape) / (1 - BETA1) for name, p in parameters.items()}
        return FirstUpdate(code.to_dense() > 0, gradients)


def available(*, peers: bool) -> tuple[list[str], list[str]]:
    """Names of the contenders that can run, and lines that say which cannot and why."""
    missing = step_peers.missing()
    names, lines = [name for name in CONTENDERS if name not in PEERS], list[str]()
    if not peers:
        return names, ["Peers were left out (--no-peers)."]
    for name in PEERS:
        package = step_peers.PACKAGES[name.split()[0]]
        if package in missing:
            lines.append(f"{name}: {package} is not installed; `make bench` installs it.")
        else:
            names.append(name)
    return names, lines
