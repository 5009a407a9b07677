"""What encoding a corpus costs beside the bare product of the encoder, at the sizes of the step benchmark.

`Crosscoder.encode` in eval mode, calibrated, without a graph, against `torch.addmm(b, x, W_encᵀ)` in fp32 and in bf16,
on batches of the step benchmark's world; weights are trained for a short while, so that codes are not those of noise.

    python benchmarks/encode.py [--size A B C] [--rounds 15] [--training-steps 60]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from step_data import World
from step_sizes import SIZES, Size
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, TopK
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer


def trained(size: Size, nonlinearity: Nonlinearity, world: World, *, steps: int) -> Crosscoder:
    """A crosscoder of that size after some steps, calibrated, in eval mode."""
    cc = Crosscoder(size.wiring, nonlinearity)
    batches = [world.batch(i) for i in range(4)]
    fitted = normaliser.fit(size.sources, batches)
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    config = TrainConfig(num_tokens=steps * size.batch_size, batch_size=size.batch_size, learning_rate=1e-3)
    trainer = Trainer(cc, config)
    for step in range(steps):
        trainer.step(batches[step % 4])
    cc.drop_spares()
    cc.calibrate(batches)
    return cc.eval()


@torch.no_grad()
def race(cc: Crosscoder, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contender, one turn each per round."""
    weights = cc.weights[0]
    encoder, bias, normalised = weights.encoder.detach(), weights.encoder_bias.detach(), cc.normalise_reads(x)
    half = [t.bfloat16() for t in (bias, normalised, encoder)]
    contenders: dict[str, Callable[[], object]] = {
        "encode": lambda: cc.encode(x),
        "product, fp32": lambda: torch.addmm(bias, normalised, encoder.T),
        "product, bf16": lambda: torch.addmm(half[0], half[1], half[2].T),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description="Encoding beside the bare product of the encoder.")
    parser.add_argument("--size", nargs="+", default=["A", "B", "C"], choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--training-steps", type=int, default=60)
    arguments = parser.parse_args()
    for name in arguments.size:
        size = SIZES[name]
        world = World(size)
        for kind in (BatchTopK(size.k), TopK(size.k)):
            cc = trained(size, kind, world, steps=arguments.training_steps)
            times = race(cc, world.batch(10_000), arguments.rounds)
            l0 = cc.encode(world.batch(10_000)).l0
            print(f"{name}, {kind.kind}, L0 {l0:.0f}: ", end="")
            print(", ".join(f"{what} {median(found):.1f} ms" for what, found in times.items()), end="; encode / ")
            for what in ("product, fp32", "product, bf16"):
                ratio = median([a / b for a, b in zip(times["encode"], times[what], strict=True)])
                print(f"{what} {ratio:.2f}", end="  ")
            print()


if __name__ == "__main__":
    main()
