"""What a weakly causal crosscoder over 12 layers costs beside the acausal one of as many latents.

Groups are stored and computed only where they read and write: of the 12 × 12 blocks of encoder and decoder a weakly
causal wiring has 12 (each group reads its own layer) and 78 (it writes that layer and all later ones). Parameters are
counted. Step times are medians of steps that take turns in one process; peak memory is that of one process each, less
that of a process which has the rows and no crosscoder.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from statistics import median

import torch

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, ReLU
from crosscoder.sources import Source, SourceSet
from crosscoder.training.config import L1Sparsity, NoSparsity, TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal, weakly_causal

NUM_LAYERS = 12
WIDTH = 256
NUM_LATENTS = 6144
BATCH_SIZE = 512
ROUNDS = 7
LEARNING_RATE = 1e-4
KINDS: dict[str, Nonlinearity] = {"relu + l1": ReLU(), "batchtopk": BatchTopK(64)}
WIRINGS = ("acausal", "weakly-causal")


def compare_cost() -> str:
    """The comparison as a Markdown table."""
    # First, while this process is small: the peak of a child includes its parent's.
    memory = [_line(f"peak memory, {kind} (MB)", *peaks(kind)) for kind in KINDS]
    sources, x = layers(), rows()
    lines = [
        f"{NUM_LAYERS} layers of width {WIDTH}, {NUM_LATENTS:,} latents, batches of {BATCH_SIZE}, "
        f"{torch.get_num_threads()} thread(s), {ROUNDS} steps of each in turn.",
        "",
        "| | acausal | weakly causal | ratio |",
        "|---|---|---|---|",
    ]
    acausal_size, causal_size = (parameters(name, sources) for name in WIRINGS)
    lines += [
        _line("encoder parameters", *(float(pair[0]) for pair in (acausal_size, causal_size))),
        _line("decoder parameters", *(float(pair[1]) for pair in (acausal_size, causal_size))),
        _line("FLOPs of dense products per row", *(float(4 * e + 6 * d) for e, d in (acausal_size, causal_size))),
    ]
    state = (16e-6 * (e + d) for e, d in (acausal_size, causal_size))  # weights, gradients, two moments in float32
    lines.append(_line("weights, gradients and Adam's moments (MB)", *state))
    for kind in KINDS:
        lines.append(_line(f"step, {kind} (s)", *step_times(kind, sources, x)))
    return "\n".join([*lines, *memory]) + "\n"


def layers() -> SourceSet:
    """Twelve layers of one model."""
    return SourceSet(Source("base", f"layers.{layer}.resid_post", WIDTH) for layer in range(NUM_LAYERS))


def rows() -> torch.Tensor:
    """Made-up activations: cost does not depend on what they mean."""
    return torch.randn(BATCH_SIZE, NUM_LAYERS * WIDTH, generator=torch.Generator().manual_seed(0))


def trainer(name: str, kind: str, sources: SourceSet) -> Trainer:
    """A trainer of one wiring."""
    per_layer = NUM_LATENTS // NUM_LAYERS
    wiring = (
        acausal(sources, num_latents=NUM_LATENTS)
        if name == "acausal"
        else weakly_causal(sources, num_latents_per_layer=per_layer)
    )
    config = TrainConfig(num_tokens=10**6, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    sparsity = L1Sparsity(coefficient=2.0) if kind == "relu + l1" else NoSparsity()
    return Trainer(Crosscoder(wiring, KINDS[kind]), config, sparsity=sparsity)


def parameters(name: str, sources: SourceSet) -> tuple[int, int]:
    """Numbers in the encoders and in the decoders."""
    weights = trainer(name, "batchtopk", sources).crosscoder.weights
    return sum(group.encoder.numel() for group in weights), sum(group.decoder.numel() for group in weights)


def step_times(kind: str, sources: SourceSet, x: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a step of each wiring, taking turns after one step each that is not counted."""
    trainers = {name: trainer(name, kind, sources) for name in WIRINGS}
    seconds: dict[str, list[float]] = {name: [] for name in WIRINGS}
    for _ in range(ROUNDS + 1):
        for name, one in trainers.items():
            start = time.perf_counter()
            one.step(x)
            seconds[name].append(time.perf_counter() - start)
    acausal_time, causal_time = (median(seconds[name][1:]) for name in WIRINGS)
    return acausal_time, causal_time


def peaks(kind: str) -> tuple[float, float]:
    """Peak memory of both wirings in MB, without what any process of this kind takes."""
    empty, one, other = (peak_bytes(name, kind) for name in ("none", *WIRINGS))
    return (one - empty) / 1e6, (other - empty) / 1e6


def peak_bytes(name: str, kind: str) -> float:
    """Peak resident memory of a process that makes two steps of a wiring; `none` only has the rows."""
    command = [sys.executable, __file__, name, kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _line(what: str, a: float, b: float) -> str:
    shown = [f"{v:,.0f}" if v >= 100 else f"{v:.3f}" for v in (a, b)]
    return f"| {what} | {shown[0]} | {shown[1]} | {b / a:.2f} |"


def _one_process(name: str, kind: str) -> None:
    torch.set_num_threads(1)
    sources, x = layers(), rows()
    if name != "none":
        one = trainer(name, kind, sources)
        for _ in range(2):
            one.step(x)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    _one_process(*sys.argv[1:])
