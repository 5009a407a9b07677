"""Checks of the trainer on Triton's kernels: exactness, two runs, and that nobody waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import gpu_trainer
import torch
from gpu_exactness import Comparison, against_dense, on_samples
from gpu_lines import Line
from gpu_worlds import GEMMA, SMALL, TINY, Size, World
from torch import Tensor

import crosscoder as xc


def parts(device: str) -> list[tuple[str, Callable[[], Iterator[Line]]]]:
    """The checks by name; all but the largest also with a tenth of the latents dead."""
    dry = device == "cpu"
    small, large = (TINY, TINY) if dry else (SMALL, GEMMA)
    both = (False, True)
    return [
        *((f"dense fp64{of(dead)}", lambda dead=dead: dense(small, device, dead=dead)) for dead in both),
        *((f"bit for bit{of(dead)}", lambda dead=dead: repeats(small, device, dead=dead)) for dead in both),
        *((f"synchronisation{of(dead)}", lambda dead=dead: unsynchronised(small, device, dead=dead)) for dead in both),
        ("Gemma-2-2B", lambda: sampled(large, device)),
    ]


def of(dead: bool) -> str:
    """How a check with dead latents is marked."""
    return ", a tenth dead" if dead else ""


def dense(size: Size, device: str, *, dead: bool) -> Iterator[Line]:
    """A trained step against all of it in fp64."""
    steps = 2 if device == "cpu" else 200
    with gpu_trainer.on_triton(device):
        world = World(size, device=device)
        trainer = gpu_trainer.trained(world, steps=steps, dead=dead, losses=gpu_trainer.AUX)
        where = f"after {steps} steps, {size.num_latents} latents{of(dead)}"
        yield from as_lines(where, against_dense(trainer, world.rows()))


def sampled(size: Size, device: str) -> Iterator[Line]:
    """A trained step against fp64 on some rows and latents."""
    steps = 1 if device == "cpu" else 200
    with gpu_trainer.on_triton(device):
        world = World(size, device=device)
        trainer = gpu_trainer.trained(world, steps=steps)
        where = f"after {steps} steps, {size.num_latents} latents"
        yield from as_lines(where, on_samples(trainer, world.rows()))


def as_lines(where: str, comparisons: Iterator[Comparison]) -> Iterator[Line]:
    """Comparisons as lines."""
    for one in comparisons:
        yield Line(f"{where}: {one.what}", one.value <= one.bound, f"{one.value:.2e} (at most {one.bound:.0e})")


def repeats(size: Size, device: str, *, dead: bool) -> Iterator[Line]:
    """Two runs from the same start."""
    steps = 3 if device == "cpu" else 10
    with gpu_trainer.on_triton(device):
        one, two = (state(gpu_trainer.trained(World(size, device=device), steps=steps, dead=dead)) for _ in range(2))
    differ = [name for name in one if not torch.equal(one[name], two[name])]
    what = f"two runs of {steps} steps{of(dead)} are bit-equal"
    yield Line(what, not differ, ", ".join(differ) or f"all of {len(one)} tensors")


def state(trainer: xc.Trainer) -> dict[str, Tensor]:
    """Weights, gate, threshold, dead counts and moments."""
    tensors = {name: tensor.detach() for name, tensor in trainer.crosscoder.state_dict().items()}
    moments = {
        f"{key} of {name}": trainer.optimiser.state[parameter][key]
        for name, parameter in gpu_trainer.parameters(trainer).items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return tensors | moments | {"dead counts": trainer.dead.rows_since_fired}


def unsynchronised(size: Size, device: str, *, dead: bool) -> Iterator[Line]:
    """Steps in which any wait for the device raises."""
    num = 1 if device == "cpu" else 5
    with gpu_trainer.on_triton(device):
        world = World(size, device=device)
        trainer = gpu_trainer.trained(world, steps=4, dead=dead)
        batches = [world.rows() for _ in range(num)]
        with refusing_to_wait() if device == "cuda" else nullcontext():
            results = [trainer.step(x) for x in batches]
        doubtful = sum(int(cut.doubtful) for cut in trainer.crosscoder.cuts if cut.doubtful is not None)
    finite = all(bool(result.loss.isfinite()) for result in results)
    what = f"{num} steps{of(dead)} without a synchronisation"
    yield Line(what, finite and not doubtful, f"{doubtful} selections in doubt")


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within it, an operation of torch that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
