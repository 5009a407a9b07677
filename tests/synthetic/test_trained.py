"""A crosscoder trained on an easy world finds what was planted: worlds, trainer and recovery together."""

from __future__ import annotations

from itertools import islice

import pytest

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import TopK
from crosscoder.synthetic import (
    ConceptWorld,
    WorldConfig,
    exclusive_recovery,
    firing_density,
    layer_world,
    matching,
    narrow_exclusive,
    null_world,
    span_recovery,
)
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal


def trained(config: WorldConfig, *, num_latents: int, k: int) -> tuple[Crosscoder, ConceptWorld]:
    world = ConceptWorld(config, seed=1)
    cc = Crosscoder(acausal(world.sources, num_latents=num_latents), TopK(k), seed=0)
    fitted = normaliser.fit(world.sources, (batch.x for batch in islice(world.batches(1024), 8)))
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    Trainer(cc, TrainConfig(num_tokens=120_000, batch_size=256, learning_rate=6e-3)).run(world)
    return cc.eval(), world


@pytest.mark.slow
def test_common_exclusive_concepts_are_found() -> None:
    cc, world = trained(narrow_exclusive("common", width=32), num_latents=40, k=3)
    density = firing_density(cc, (batch.x for batch in world.contexts()))
    found = exclusive_recovery(cc, world.truth, a="base", b="chat", density=density)
    assert found.recall == 1
    assert found.precision > 0.7
    assert matching(cc, world.truth).matched_cosine > 0.9


@pytest.mark.slow
def test_nothing_is_called_exclusive_where_nothing_is() -> None:
    cc, world = trained(null_world("noise", num_concepts=30, width=32), num_latents=60, k=2)
    assert exclusive_recovery(cc, world.truth, a="base", b="chat").num_called == 0
    assert matching(cc, world.truth).recovered() > 0.9


@pytest.mark.slow
def test_spans_are_found() -> None:
    cc, world = trained(layer_world(4, num_concepts=24, width=32), num_latents=80, k=3)
    found = span_recovery(cc, world.truth)
    assert found.recall > 0.9
    assert found.mean_overlap > 0.95
    assert float(found.following[found.recovered].mean()) > 0.95
