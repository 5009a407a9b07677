"""Rows and trained weights of the step benchmark: made once per size, kept in a folder, read by every process.

    x_r = m + D^½ (Σ_c v_rc d_c + A z_r + σ w_r)

Concepts c = 1 … F/2 fire with Zipf's frequencies, k a row on average, with exponential values; A is of rank D/8 with a
spectrum that falls as `i^−½`; D is diagonal and log-normal, and some columns of the mean m are far from zero, as in
residual streams. White noise would have neither hot latents nor a low-rank residual, and selection on it is easy.
A batch is a pure function of (seed, number): training and timing never see the same rows.

With *dead* latents, every tenth has an encoder so short that its score never comes near the threshold. A very low bias
would do too, but then no pre-activation is positive, and AuxK has nothing to give a gradient to.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from step_sizes import Size
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, Nonlinearity
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer

POOL = 6
"""Batches that are timed, in turn."""
FIRST_TIMED, FIRST_FITTED = 1_000_000, 2_000_000
LEARNING_RATE = 1e-3
DEAD_SHARE = 0.1
DEAD_SCORE = 0.1
"""The largest score of a dead latent, as a share of the threshold."""
NORMALISER_BATCHES = 8


class World:
    """Batches of one size."""

    def __init__(self, size: Size, *, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        rng, width = torch.Generator().manual_seed(seed), size.total_width
        num_concepts, rank = max(1, size.num_latents // 2), max(1, width // 8)
        self._directions = torch.nn.functional.normalize(torch.randn(num_concepts, width, generator=rng), dim=1)
        rates = (torch.arange(num_concepts) + 10.0) ** -0.8
        self._rates = (rates * size.k / rates.sum()).clamp(max=0.5)
        spectrum = torch.arange(1.0, rank + 1) ** -0.5
        basis = torch.randn(rank, width, generator=rng) * spectrum[:, None]
        self._basis = basis * (0.4 * size.k / basis.square().sum()).sqrt()
        self._columns = torch.randn(width, generator=rng).mul(0.5).exp()
        outliers = torch.rand(width, generator=rng) < 0.01
        self._mean = torch.randn(width, generator=rng) * torch.where(outliers, 10.0, 0.3)

    def batch(self, number: int) -> Tensor:
        """The rows of one batch, raw and packed."""
        rng, size = torch.Generator().manual_seed(self.seed + 1 + number), self.size
        fires = torch.rand(size.batch_size, len(self._rates), generator=rng) < self._rates
        values = torch.empty(fires.shape).exponential_(generator=rng) * fires
        x = values @ self._directions
        x += torch.randn(size.batch_size, len(self._basis), generator=rng) @ self._basis
        x += 0.1 * (size.k / size.total_width) ** 0.5 * torch.randn(x.shape, generator=rng)
        return x * self._columns + self._mean


@dataclass(frozen=True)
class Normaliser:
    """`x̃ = (x − μ) c`."""

    mean: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Raw packed rows, normalised in this normaliser's precision."""
        return (x.to(self.mean.dtype) - self.mean) * self.scale


@dataclass(frozen=True)
class Start:
    """Weights that every contender begins with, in normalised space, and which latents are dead."""

    size: Size
    tensors: dict[str, Tensor]
    dead: Tensor

    def crosscoder(self, nonlinearity: Nonlinearity) -> Crosscoder:
        """A crosscoder of its own with these weights."""
        cc = Crosscoder(self.size.wiring, nonlinearity, seed=None)
        own = cc.weights[0]
        with torch.no_grad():
            for name in ("encoder", "decoder", "encoder_bias", "threshold"):
                getattr(own, name).copy_(self.tensors[name])
            cc.bias.copy_(self.tensors["bias"])
        cc.set_normaliser(self.tensors["mean"], self.tensors["scale"])
        cc.settle()
        return cc

    def normaliser(self, dtype: torch.dtype = torch.float32) -> Normaliser:
        """What turns raw rows into those that the weights are for; it keeps no weights alive."""
        scale = self.tensors["scale"].repeat_interleave(self.size.width)
        return Normaliser(self.tensors["mean"].to(dtype), scale.to(dtype))


def folder_of(size: Size, cache: Path) -> Path:
    """Where rows and weights of a size are kept; other numbers are another folder."""
    shape = size.shape.replace(" ", "-").replace("=", "")
    return cache / f"{shape}-steps{size.training_steps}"


def prepare(size: Size, cache: Path) -> Path:
    """Train and draw what is missing, and give the folder."""
    folder = folder_of(size, cache)
    if not (folder / "weights.safetensors").exists():
        draft = folder.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(size, draft)
        draft.rename(folder)
    return folder


def pool(folder: Path) -> list[Tensor]:
    """The batches that are timed: raw and packed."""
    return [x.clone() for x in load_file(folder / "pool.safetensors")["x"]]


def untrained(size: Size) -> Start:
    """Initial weights, and a threshold that no score reaches."""
    cc = Crosscoder(size.wiring, BatchTopK(size.k))
    return Start(size, _tensors(cc) | {"threshold": torch.tensor(1e3)}, torch.zeros(0, dtype=torch.int64))


def start(size: Size, folder: Path, *, dead: bool) -> Start:
    """The trained weights, with a tenth of the latents dead if asked for."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "weights.safetensors").items()}
    shortening = tensors.pop("shortening")
    ids = dead_latents(size) if dead else torch.zeros(0, dtype=torch.int64)
    tensors["encoder"][ids] *= shortening[ids, None]
    tensors["encoder_bias"][ids] *= shortening[ids]
    return Start(size, tensors, ids)


def explained(folder: Path) -> float:
    """The share of the variance that the weights explained in the last tenth of their training."""
    with safe_open(folder / "weights.safetensors", framework="pt") as weights:
        return float(weights.get_tensor("fve"))


def dead_latents(size: Size) -> Tensor:
    """Every tenth latent."""
    return torch.arange(0, size.num_latents, round(1 / DEAD_SHARE))


def _write(size: Size, folder: Path) -> None:
    world = World(size)
    cc, fve = _trained(world)
    rows = torch.stack([world.batch(FIRST_TIMED + number) for number in range(POOL)])
    tensors = _tensors(cc) | {"shortening": _shortening(cc, rows), "fve": torch.tensor(fve)}
    save_file({"x": rows}, folder / "pool.safetensors")
    save_file(tensors, folder / "weights.safetensors")


def _tensors(cc: Crosscoder) -> dict[str, Tensor]:
    own = cc.weights[0]
    parameters = {name: getattr(own, name) for name in ("encoder", "encoder_bias", "decoder", "threshold")}
    tensors = parameters | {"bias": cc.bias, "mean": cc.mean, "scale": cc.scale}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _trained(world: World) -> tuple[Crosscoder, float]:
    """A crosscoder after its training steps, and the share of the variance that it explained in the last ones."""
    size = world.size
    cc = Crosscoder(size.wiring, BatchTopK(size.k))
    fitted = normaliser.fit(size.sources, (world.batch(FIRST_FITTED + n) for n in range(NORMALISER_BATCHES)))
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    num_tokens = size.training_steps * size.batch_size
    config = TrainConfig(num_tokens=num_tokens, batch_size=size.batch_size, learning_rate=LEARNING_RATE)
    trainer = Trainer(cc, config)
    errors = [float(trainer.step(x).source_errors.sum()) for x in islice(_batches(world), size.training_steps)]
    last = errors[-max(1, len(errors) // 10) :]
    return cc, 1 - sum(last) / len(last) / size.total_width


def _batches(world: World) -> Iterator[Tensor]:
    for number in range(FIRST_TIMED):
        yield world.batch(number)


@torch.no_grad()
def _shortening(cc: Crosscoder, rows: Tensor) -> Tensor:
    """Factors on the encoders under which no latent's score on `rows` exceeds DEAD_SCORE of the threshold."""
    own = cc.weights[0]
    largest = torch.full_like(own.encoder_bias, 1e-6)
    for x in rows:
        pre = torch.addmm(own.encoder_bias, cc.normalise(x), own.encoder.T)
        largest = torch.maximum(largest, (pre * own.gate).amax(0))
    return (DEAD_SCORE * own.threshold / largest).clamp(max=1.0)
