"""Initial weights that any device and any mesh draws alike.

Decoder rows of latent i at source s have a random direction and the norm `decoder_norm`; the encoder is the transpose
of the decoder where a group reads what it writes. Numbers come from Philox, a counter-based generator, on the CPU: key
(seed, group), counter (block of latents), so that a shard draws its own rows and nothing else.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from crosscoder.nonlinearities import JumpReLU, Nonlinearity
from crosscoder.sources import SourceSet
from crosscoder.wiring import LatentGroup

BLOCK = 1024
Across = Literal["same", "independent"]


def weights(
    group: LatentGroup, *, sources: SourceSet, seed: int | None, decoder_norm: float, across_sources: Across
) -> tuple[Float[Tensor, "latents reads"], Float[Tensor, "latents stored"]]:
    """Encoder and stored decoder of one group; a tied decoder is drawn once, and its encoders start as its copies.

    Without a seed both are zero: for weights that come from elsewhere, drawing is the slowest part of loading.
    """
    stored = group.writes[:1] if group.tied == "decoder" else group.writes
    if seed is None:
        widths = (sources.subset(keys).width for keys in (group.reads, stored))
        encoder, decoder = (torch.zeros(group.num_latents, width) for width in widths)
        return encoder, decoder
    across = "same" if group.tied == "decoder" else across_sources
    drawn = {
        keys: rows(group, keys=keys, sources=sources, seed=seed, decoder_norm=decoder_norm, across_sources=across)
        for keys in {group.reads, stored}
    }
    return drawn[group.reads].clone(), drawn[stored]


def log_threshold(nonlinearity: Nonlinearity) -> float | None:
    """Where JumpReLU's thresholds start; None for all others."""
    return math.log(nonlinearity.initial_threshold) if isinstance(nonlinearity, JumpReLU) else None


def rows(
    group: LatentGroup,
    *,
    keys: tuple[str, ...],
    sources: SourceSet,
    seed: int,
    decoder_norm: float,
    across_sources: Across,
) -> Float[Tensor, "latents width"]:
    """Initial rows of one group over the sources `keys`: the decoder over its writes, the encoder over its reads.

    The same source gets the same rows in both, so that the encoder starts as the decoder's transpose.
    """
    drawn: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    for key in keys:
        stream = "all sources" if across_sources == "same" else key
        if stream not in drawn:
            numbers = normal(seed, f"{group.name}/{stream}", num_rows=group.num_latents, width=max(sources.widths))
            drawn[stream] = torch.from_numpy(numbers)
        directions = drawn[stream][:, : sources[key].width]
        parts.append(decoder_norm * torch.nn.functional.normalize(directions, dim=1))
    return torch.cat(parts, dim=1)


def normal(seed: int, name: str, *, num_rows: int, width: int) -> Float[np.ndarray, "rows width"]:
    """Standard normal rows, each block of 1,024 keyed by (seed, name, block)."""
    key = [seed % 2**64, xxhash.xxh3_64_intdigest(name.encode())]
    blocks = [_block(key, block, width) for block in range(-(-num_rows // BLOCK))]
    return np.concatenate(blocks)[:num_rows]


def _block(key: list[int], block: int, width: int) -> Float[np.ndarray, "block width"]:
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array([0, 0, 0, block], dtype=np.uint64))
    return np.random.Generator(bits).standard_normal((BLOCK, width), dtype=np.float32)
