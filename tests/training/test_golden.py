"""Twenty losses, pinned: a change that is not meant to change training must leave them as they are.

They are of one CPU thread. When a change is meant, print them anew with `python -m pytest -s` and the test's own list.
"""

from __future__ import annotations

from itertools import islice

import pytest

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, ReLU
from crosscoder.training import normaliser
from crosscoder.training.config import AuxConfig, L1Sparsity, LossesConfig, NoSparsity, TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal
from training.worlds import SOURCES, ToyWorld

BATCH_TOP_K: list[float] = [
    19.6955,
    19.2050,
    18.2052,
    14.8963,
    14.9335,
    14.3105,
    12.6125,
    13.8292,
    11.5371,
    11.3393,
    10.6698,
    12.2263,
    9.7708,
    10.7633,
    9.1916,
    9.9203,
    10.1808,
    9.6857,
    9.2267,
    8.3024,
]
RELU: list[float] = [
    18.1893,
    19.0031,
    17.8467,
    14.8491,
    14.8244,
    14.3111,
    12.9487,
    13.5336,
    11.8142,
    11.6117,
    11.1103,
    12.5553,
    10.3199,
    11.3105,
    9.8557,
    10.5812,
    10.4999,
    10.4012,
    9.9061,
    8.8498,
]


def losses(kind: Nonlinearity, sparsity: NoSparsity | L1Sparsity) -> list[float]:
    cc = Crosscoder(acausal(SOURCES, num_latents=48), kind, seed=11)
    fitted = normaliser.fit(SOURCES, (b.x for b in islice(ToyWorld().batches(500), 4)))
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    config = TrainConfig(num_tokens=128 * 20, batch_size=128, learning_rate=1e-2)
    t = Trainer(cc, config, sparsity=sparsity, losses=LossesConfig(aux=AuxConfig(dead_after_tokens=384)))
    return [float(t.step(b.x).loss) for b in islice(ToyWorld().batches(128), 20)]


@pytest.mark.parametrize(
    ("kind", "sparsity", "expected"),
    [(BatchTopK(5), NoSparsity(), BATCH_TOP_K), (ReLU(), L1Sparsity(coefficient=0.3), RELU)],
    ids=["batch_topk", "relu"],
)
def test_twenty_losses(kind: Nonlinearity, sparsity: NoSparsity | L1Sparsity, expected: list[float]) -> None:
    assert losses(kind, sparsity) == pytest.approx(expected, rel=1e-4)
