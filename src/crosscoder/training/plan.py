"""What a run will take, before it takes it: parameters, memory, rows and disk. `crosscoder train --dry-run`.

Peak memory of a run on a CPU is the sum of parts that live at the same time:

    libraries                     what this process holds once they are imported (measured)
    models                        parameters × bytes of their dtype
    forward pass                  the activations of one batch of contexts inside a block
    buffer                        rows of one fill, and their order
    weights, gradients, Adam      16 bytes a parameter, and 12 more while a checkpoint is written
    step                          a few copies of the batch, a block of pre-activations, the active pairs

Dictionaries that train together share all but their weights, gradients and moments; their steps take turns.

Models are built without weights ("meta" tensors), so nothing large is read.
On a GPU all parts but the libraries lie there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from crosscoder.capture.architectures import architecture_of
from crosscoder.capture.buffer import bytes_per_row
from crosscoder.capture.loading import ModelConfig, dtype_of, empty_model
from crosscoder.groups import GroupLayout
from crosscoder.kernels.candidates import BLOCK_ELEMENTS
from crosscoder.nonlinearities import JumpReLU, Nonlinearity
from crosscoder.sources import split_key
from crosscoder.training.config import RunConfig
from crosscoder.training.several import require_one_stream
from crosscoder.wiring import Wiring

FORWARD_TOKENS = 8192
CHECKPOINTS_ON_DISK = 3
"""Two are kept while the third is written."""
PERMUTATION_BYTES = 8
BYTES_PER_PAIR = 96
"""Row, latent, value, score, gradient and their sorted copies of one active pair, and candidates above the cut."""


@dataclass(frozen=True)
class Plan:
    """What a run will take; memory and disk in bytes."""

    parameters: int
    sources: Mapping[str, int]
    memory: Mapping[str, int]
    memory_total: int
    bytes_per_row: int
    rows_per_fill: int
    rows_per_step: int
    num_steps: int
    disk: int
    dictionaries: Mapping[str, int]
    """Parameters of each, by the name of its directory."""

    def in_words(self) -> dict[str, str]:
        """The plan as a person reads it."""
        words = {f"source {key}": f"width {width:,}" for key, width in self.sources.items()}
        words |= {f"memory: {part}": _gigabytes(size) for part, size in self.memory.items()}
        if len(self.dictionaries) > 1:
            words |= {f"dictionary {name}": f"{count:,} parameters" for name, count in self.dictionaries.items()}
        return words | {
            "memory at its peak": _gigabytes(self.memory_total),
            "disk": _gigabytes(self.disk),
            "parameters": f"{self.parameters:,}",
            "buffer": f"{self.rows_per_fill:,} rows of {self.bytes_per_row:,} bytes",
            "training": f"{self.num_steps:,} steps of {self.rows_per_step:,} rows",
        }


@dataclass(frozen=True)
class _Outline:
    """A model without its weights: how many parameters, of which dtype, and how wide."""

    parameters: int
    dtype: torch.dtype
    hidden_size: int
    inner_size: int

    @classmethod
    def of(cls, config: ModelConfig, sites: list[str]) -> _Outline:
        model = empty_model(config)
        architecture = architecture_of(model)
        for site in sites:
            architecture.tap(site)  # raises UnsupportedSite
        text: Any = model.config.get_text_config()
        dtype = dtype_of(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        return cls(count, dtype, text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size)


def plan(run: RunConfig, *others: RunConfig) -> Plan:
    """The plan of a run, or of several that train together; raises as they would for what cannot be."""
    runs = (run, *others)
    require_one_stream(runs)
    keys = [split_key(key) for key in run.harvested_keys]
    outlines = {
        alias: _Outline.of(config, [site for owner, site in keys if owner == alias])
        for alias, config in run.models.items()
    }
    widths = {key: outlines[split_key(key)[0]].hidden_size for key in run.harvested_keys}
    sources = run.source_set(widths)
    wirings = [each.wiring.build(sources) for each in runs]
    storage = reduce(torch.promote_types, (outline.dtype for outline in outlines.values()))
    row = bytes_per_row(sources.underlying.width, storage)
    counts = [num_parameters(wiring, each.nonlinearity.build()) for each, wiring in zip(runs, wirings, strict=True)]
    parameters = sum(counts)
    rows_per_fill = run.rows_per_fill(row)
    memory = {
        "libraries": resident_bytes(),
        "models": sum(outline.parameters * outline.dtype.itemsize for outline in outlines.values()),
        "forward pass": max(_forward_bytes(outline) for outline in outlines.values()),
        "buffer": (row + PERMUTATION_BYTES) * rows_per_fill,
        "weights, gradients, Adam": 28 * parameters,
        "step": max(_step_bytes(each, wiring) for each, wiring in zip(runs, wirings, strict=True)),
    }
    return Plan(
        parameters=parameters,
        sources={source.key: source.width for source in sources},
        memory=memory,
        memory_total=sum(memory.values()),
        bytes_per_row=row,
        rows_per_fill=rows_per_fill,
        rows_per_step=run.train.batch_size,
        num_steps=run.train.num_steps,
        disk=parameters * (12 * CHECKPOINTS_ON_DISK + 4),
        dictionaries={Path(each.out or "run").name: count for each, count in zip(runs, counts, strict=True)},
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def num_parameters(wiring: Wiring, nonlinearity: Nonlinearity) -> int:
    """Encoder and decoder where a group reads and writes, one bias per latent and per written column."""
    thresholds = wiring.num_latents if isinstance(nonlinearity, JumpReLU) else 0
    return (
        thresholds
        + wiring.writes.width
        + sum(_group_parameters(GroupLayout(group, wiring), wiring) for group in wiring)
    )


def _group_parameters(layout: GroupLayout, wiring: Wiring) -> int:
    reads = wiring.sources.subset(layout.group.reads).width
    return layout.group.num_latents * (1 + reads + sum(layout.stored_widths)) + sum(layout.skip_widths) * reads


def resident_bytes() -> int:
    """Memory that this process holds now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forward_bytes(outline: _Outline) -> int:
    return FORWARD_TOKENS * outline.dtype.itemsize * (6 * outline.hidden_size + 3 * outline.inner_size)


def _step_bytes(run: RunConfig, wiring: Wiring) -> int:
    batch, width = run.train.batch_size, wiring.sources.width
    full = batch * wiring.num_latents
    block = min(BLOCK_ELEMENTS, full) if run.k else 4 * full  # ReLU and JumpReLU begin with full matrices
    pairs = batch * (run.k or 0)
    return 4 * (6 * batch * width + block) + BYTES_PER_PAIR * pairs
