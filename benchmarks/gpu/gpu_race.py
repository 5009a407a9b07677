"""The trainer's step and two others in turns, on the same batches, from the same trained weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gpu_trainer
from gpu_contenders import DenseStep, TextbookStep
from gpu_timing import Result, Watch, allocated, peak, result
from gpu_trainer import TimedStep, Weights
from gpu_worlds import Size, World

Step = TimedStep | DenseStep | TextbookStep
OURS, OURS_WITH_DEAD = "ours", "ours, a tenth dead"


def race(size: Size, device: str, *, steps: int) -> list[Result]:
    """Every contender's times at one size, in turns."""
    with gpu_trainer.on_triton(device):
        world = World(size, device=device)
        contenders, peaks = start(world, device, warm=1 if device == "cpu" else 200)
        watches: dict[str, list[Watch]] = {name: [] for name in contenders}
        for turn in range(steps):
            x = world.rows()
            order = list(contenders) if turn % 2 else list(contenders)[::-1]
            for name in order:
                watches[name].append(Watch(device))
                contenders[name](x, watches[name][-1])
    found: list[Result] = []
    for name, step in contenders.items():
        dead = step.trainer.dead.count if isinstance(step, TimedStep) else 0
        times = [watch.phases() for watch in watches[name]]
        found.append(result(name, times, rows=size.rows, held=peaks[name], dead=dead))
    return found


def start(world: World, device: str, *, warm: int) -> tuple[dict[str, Step], dict[str, float]]:
    """The contenders with the weights that our step has after `warm` steps, and what each of them holds at most."""
    weights = Weights.of(gpu_trainer.trained(world, steps=warm))
    contenders: dict[str, Step] = {}
    peaks: dict[str, float] = {}
    for name, make in makers(world, weights).items():
        before = allocated(device)
        try:
            step = make()
            for _ in range(1 if device == "cpu" else 5):
                step(world.rows())
            peaks[name] = peak(lambda step=step: step(world.rows()), device, held=before)
        except (RuntimeError, TypeError) as error:  # the others are measured all the same, but not without ours
            if name == OURS:
                raise
            print(f"{name} is left out at {world.size.rows} rows: {error}", flush=True)
            continue
        contenders[name] = step
    return contenders, peaks


def makers(world: World, weights: Weights) -> dict[str, Callable[[], Step]]:
    """How each contender is made; each has its own copy of the weights."""
    size = world.size

    def ours(*, dead: bool) -> TimedStep:
        made = gpu_trainer.trainer(world, weights, learning_rate=1e-4)
        if dead:
            gpu_trainer.silence(made)
        return TimedStep(made)

    def other(kind: type[DenseStep] | type[TextbookStep]) -> DenseStep | TextbookStep:
        return kind(weights.encoder.clone(), weights.decoder.clone(), widths=size.widths, k=size.k)

    return {
        OURS: partial(ours, dead=False),
        OURS_WITH_DEAD: partial(ours, dead=True),
        "dense bf16": partial(other, DenseStep),
        "textbook sparse": partial(other, TextbookStep),
    }
