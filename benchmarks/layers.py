"""All layers of the shipped base model in one dictionary: acausal, weakly causal, per-layer SAEs.

    python benchmarks/layers.py                              # three seeds; goes on where it stopped
    python benchmarks/layers.py --quick --out /tmp/layers    # shows that it runs, proves nothing
    python benchmarks/layers.py --report                     # from the cells that are there, trains nothing
    python benchmarks/layers.py --cost                       # what the masked half of a causal wiring costs

Rows are the residual stream after each of six layers on held-in books, harvested once per seed and kept in memory
(float16); a seed decides which documents are held out, their order and the initial weights. Every cell is one
dictionary: sparsity × wiring × size × seed. Under L1 all have the same coefficient and the loss is reconstruction +
L1 of norms, so that the loss of a crosscoder and the sum of the SAEs' losses are one quantity (Lindsey et al. 2024);
per-layer SAEs are one crosscoder of six groups, which without gradient clipping is six SAEs trained apart. Under
BatchTopK all have the same k per row over all layers together. AuxK is off under L1, as published, on under BatchTopK.

FLOPs are those of the dense products of the blocks that exist, per training row: 4 for every encoder parameter
(product, gradient of the weights) and 6 for every decoder parameter (and gradient of the code).
The findings and the rule that decides them were registered before the runs: `layers_findings.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from layers_cost import compare_cost
from layers_report import write_report
from torch import Tensor

from crosscoder.capture import (
    ActivationStream,
    Corpus,
    DatasetConfig,
    HeldOutConfig,
    ModelConfig,
    StudiedModel,
    TextConfig,
)
from crosscoder.crosscoder import Crosscoder
from crosscoder.demo.files import data_path
from crosscoder.nonlinearities import BatchTopK, ReLU
from crosscoder.sources import SourceSet
from crosscoder.training import normaliser
from crosscoder.training.config import AuxConfig, L1Sparsity, LossesConfig, NoSparsity, TrainConfig
from crosscoder.training.json_numbers import json_text
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import Wiring, acausal, per_source, weakly_causal

NUM_LAYERS = 6
COEFFICIENT = 2.0
K = 60
"""Active latents per row under BatchTopK, all layers together."""
LEARNING_RATE = 8e-3
"""By a pilot on other rows, at one or two sizes of each wiring: the same rate does well for all, and less is worse."""
BATCH_SIZE = 512
NO_CLIPPING = 1e9
NORMALISER_ROWS = 50_000
EVALUATION_BLOCK = 4096
HARVEST_BYTES = 200_000_000

SIZES = {
    "l1": {"acausal": (256, 512, 1024, 1536), "weakly-causal": (64, 128, 256, 512), "per-layer": (128, 256, 512, 1024)},
    "batchtopk": {"acausal": (256, 512, 1536), "weakly-causal": (256,), "per-layer": (256, 512)},
}
"""Latents: in all of the acausal crosscoder, per layer of the others."""
QUICK_SIZES = {
    "l1": {"acausal": (64, 128, 256), "weakly-causal": (16, 32, 64), "per-layer": (32, 64, 128)},
    "batchtopk": {"acausal": (256,), "weakly-causal": (), "per-layer": (256,)},
}


@dataclass(frozen=True)
class CellName:
    """One dictionary of the sweep."""

    sparsity: str
    wiring: str
    size: int
    seed: int

    @property
    def file(self) -> str:
        """The file that keeps its result."""
        return f"{self.sparsity}--{self.wiring}--{self.size}--{self.seed}.json"


@dataclass(frozen=True)
class RowsInMemory:
    """Raw rows of all layers, shuffled: for training, and held out."""

    sources: SourceSet
    training: Tensor
    held_out: Tensor

    def batches(self) -> Iterator[Tensor]:
        """All training rows, once, in whole batches."""
        for first in range(0, len(self.training) - BATCH_SIZE + 1, BATCH_SIZE):
            yield self.training[first : first + BATCH_SIZE].float()

    def blocks(self, rows: Tensor, num_rows: int) -> Iterator[Tensor]:
        """The first `num_rows` rows, in blocks."""
        for part in rows[:num_rows].split(EVALUATION_BLOCK):
            yield part.float()


def main() -> None:
    """Train what is missing, decide, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cost:
        print(compare_cost())
        return
    settings = {
        "coefficient": COEFFICIENT,
        "k": K,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "rows": options.rows,
        "held_out_rows": options.held_out_rows,
        "quick": options.quick,
    }
    names = [name for seed in range(options.seeds) for name in cell_names(seed, quick=options.quick)]
    if not options.report:
        train_missing(names, settings, options)
    cells = [cell for name in names if (cell := finished(options.out / name.file, settings)) is not None]
    print(write_report(cells, settings, options.out, seeds=range(options.seeds)))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks/layers"), help="directory of cells and report"
    )
    parser.add_argument("--rows", type=int, default=300_000, help="rows that every dictionary is trained on, once")
    parser.add_argument("--held-out-rows", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed, few rows, small dictionaries")
    parser.add_argument("--report", action="store_true", help="only report on the cells that are finished")
    parser.add_argument("--cost", action="store_true", help="only compare the cost of causal and acausal wirings")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.held_out_rows, options.seeds = 60_000, 8_000, 1
    return options


def cell_names(seed: int, *, quick: bool) -> Iterator[CellName]:
    """The dictionaries of one seed."""
    for sparsity, by_wiring in (QUICK_SIZES if quick else SIZES).items():
        for wiring, sizes in by_wiring.items():
            yield from (CellName(sparsity, wiring, size, seed) for size in sizes)


def train_missing(names: list[CellName], settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Train every cell that has no result of these settings, seed by seed; rows of a seed are harvested once."""
    for seed in range(options.seeds):
        missing = [n for n in names if n.seed == seed and finished(options.out / n.file, settings) is None]
        if not missing:
            continue
        start = time.perf_counter()
        rows = harvest(seed, num_rows=options.rows, num_held_out=options.held_out_rows)
        print(f"seed {seed}: {len(rows.training):,} rows in {time.perf_counter() - start:.0f} s", flush=True)
        fitted = normaliser.fit(rows.sources, rows.blocks(rows.training, NORMALISER_ROWS))
        for name in missing:
            cell = {**asdict(name), "settings": settings, **train_cell(name, rows, fitted)}
            (options.out / name.file).write_text(json_text(cell, indent=1) + "\n", encoding="utf-8")
            print(f"{name.file}: {cell['seconds']:.0f} s", flush=True)


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a cell, if it is there and of these settings."""
    if not path.is_file():
        return None
    cell = json.loads(path.read_text(encoding="utf-8"))
    return cell if cell["settings"] == settings else None


def harvest(seed: int, *, num_rows: int, num_held_out: int) -> RowsInMemory:
    """Rows of all layers over the shipped books."""
    data = data_path()
    models = {"base": StudiedModel.load("base", ModelConfig(path=str(data / "base")))}
    sources = SourceSet(models["base"].source(f"layers.{layer}.resid_post") for layer in range(NUM_LAYERS))
    config = TextConfig(
        tokenizer="base",
        context_length=256,
        packing="document",
        mix=(DatasetConfig(dataset=str(data / "books.parquet")),),
        held_out=HeldOutConfig(fraction=0.1, num_tokens=num_held_out),
    )
    corpus = Corpus(config, models["base"].tokenizer, seed=seed)
    text = corpus.held_out()
    batches = ActivationStream(models, sources, corpus, buffer_bytes=HARVEST_BYTES).batches(BATCH_SIZE)
    training = torch.empty(num_rows // BATCH_SIZE * BATCH_SIZE, sources.width, dtype=torch.float16)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    for places in order.split(BATCH_SIZE):  # the buffer mixes only its own fill
        training[places] = next(batches).x.half()
    contexts = ActivationStream(models, sources, text, buffer_bytes=HARVEST_BYTES).contexts()
    held_out = torch.cat([part.x.half() for part in contexts])
    if not bool(torch.isfinite(training).all() & torch.isfinite(held_out).all()):
        raise OverflowError("activations do not fit into float16")
    return RowsInMemory(sources, training, held_out)


def wiring_of(name: CellName, sources: SourceSet) -> Wiring:
    """The wiring of a cell."""
    if name.wiring == "acausal":
        return acausal(sources, num_latents=name.size)
    if name.wiring == "weakly-causal":
        return weakly_causal(sources, num_latents_per_layer=name.size)
    return per_source(sources, num_latents_per_source=name.size)


def train_cell(name: CellName, rows: RowsInMemory, fitted: normaliser.Normaliser) -> dict[str, float]:
    """Train one dictionary on all rows and measure it on the held-out ones."""
    is_l1 = name.sparsity == "l1"
    cc = Crosscoder(wiring_of(name, rows.sources), ReLU() if is_l1 else BatchTopK(K), seed=name.seed)
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    trainer = Trainer(
        cc,
        TrainConfig(
            num_tokens=len(rows.training),
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            decay_fraction=0.5,
            gradient_clip=NO_CLIPPING,
        ),
        sparsity=L1Sparsity(coefficient=COEFFICIENT) if is_l1 else NoSparsity(),
        losses=LossesConfig(aux=AuxConfig(coefficient=0.0)) if is_l1 else LossesConfig(),
    )
    start = time.perf_counter()
    for x in rows.batches():
        trainer.step(x)
    seconds = time.perf_counter() - start
    cc.calibrate(rows.blocks(rows.training, NORMALISER_ROWS))
    cc.eval()
    return {"seconds": seconds, **size_of(cc), **measure(cc, rows)}


def size_of(cc: Crosscoder) -> dict[str, float]:
    """Latents, parameters, and FLOPs of the dense products of one training row."""
    encoder, decoder = (sum(getattr(group, name).numel() for group in cc.weights) for name in ("encoder", "decoder"))
    return {
        "num_latents": cc.num_latents,
        "num_parameters": sum(parameter.numel() for parameter in cc.parameters()),
        "flops_per_row": 4 * encoder + 6 * decoder,
    }


@torch.no_grad()
def measure(cc: Crosscoder, rows: RowsInMemory) -> dict[str, float]:
    """On held-out rows: the loss (normalised space), the error as a share of the variance, L0, L1, dead latents."""
    norms, count = cc.decoder_norms().sum(1), 0
    totals = torch.zeros(4, dtype=torch.float64)
    alive = torch.zeros(cc.num_latents, dtype=torch.bool)
    mean = cc.normalise(rows.held_out.float().mean(0, keepdim=True))
    for x in rows.blocks(rows.held_out, len(rows.held_out)):
        target = cc.normalise(x)
        code = cc.encode_normalised(target)
        error = (target - cc.decode_normalised(code)).square().sum()
        l1 = (code.values * norms[code.latents]).sum()
        variance = (target - mean).square().sum()
        totals += torch.tensor([float(error), float(variance), float(l1), float(code.num_active)], dtype=torch.float64)
        alive[code.latents] = True
        count += len(x)
    error, variance, l1, active = (totals / count).tolist()
    return {
        "loss": error + COEFFICIENT * l1,
        "error": error / variance,
        "fve": 1 - error / variance,
        "l1": l1,
        "l0": active,
        "dead_fraction": 1 - float(alive.float().mean()),
        "held_out_rows": count,
    }


if __name__ == "__main__":
    main()
