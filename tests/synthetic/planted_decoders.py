"""Crosscoders whose decoder is the truth of a small world, so that recovery must be perfect."""

from __future__ import annotations

import torch

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import TopK
from crosscoder.synthetic import ConceptWorld, LinearMap, Truth, WorldConfig, feb25_toy, layer_world
from crosscoder.wiring import acausal


def _small(config: WorldConfig) -> WorldConfig:
    """The same world with twelve shared concepts, and four for each model."""
    numbers = (12, 4, 4)
    groups = [g.model_copy(update={"num_concepts": n}) for g, n in zip(config.concepts, numbers, strict=True)]
    last = config.sources[1].model_copy(update={"view": LinearMap(), "width": 40})
    return config.model_copy(update={"concepts": tuple(groups), "sources": (config.sources[0], last)})


WORLD = ConceptWorld(_small(feb25_toy("tight", width=32)), seed=1)
LAYERS = ConceptWorld(layer_world(5, num_concepts=20, width=32, degrees=15), seed=1)


def planted(world: ConceptWorld = WORLD, *, scale: tuple[float, ...] = (1.0, 1.0), spare: int = 3) -> Crosscoder:
    """A crosscoder whose first latents are the concepts, and `spare` latents without a decoder."""
    truth: Truth = world.truth
    cc = Crosscoder(acausal(world.sources, num_latents=truth.num_concepts + spare), TopK(1))
    factors = torch.cat([torch.full((w,), c) for w, c in zip(world.sources.widths, scale, strict=True)])
    with torch.no_grad():
        cc.weights[0].decoder.zero_()
        cc.weights[0].decoder[: truth.num_concepts] = truth.packed * factors
    cc.set_normaliser(torch.zeros(world.sources.width), torch.tensor(scale))
    cc.refresh_gate()
    return cc.eval()
