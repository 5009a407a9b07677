"""Encoder biases from data: every latent fires on the asked fraction of rows, with and without thresholds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.nonlinearities import BatchTopK, JumpReLU, ReLU, TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.training import firing_fraction
from crosscoder.training.firing_fraction import set_firing_fraction
from crosscoder.wiring import acausal, weakly_causal

SOURCES = SourceSet(Source("base", f"layers.{layer}.resid_post", 6) for layer in range(3))


def rows(num_rows: int = 1000) -> Tensor:
    return 3 + 2 * torch.randn(num_rows, SOURCES.width, generator=torch.Generator().manual_seed(0))


def fired(cc: Crosscoder, x: Tensor) -> list[int]:
    return (cc.encode(x).to_dense() > 0).sum(0).tolist()


@pytest.mark.parametrize("kind", [ReLU(), JumpReLU(initial_threshold=0.4)], ids=["relu", "jump_relu"])
@pytest.mark.parametrize("causal", [False, True], ids=["acausal", "weakly causal"])
def test_every_latent_fires_on_that_fraction_of_rows(
    kind: ReLU | JumpReLU, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing_fraction, "BLOCK_ELEMENTS", 3000)  # three latents at a time
    wiring = weakly_causal(SOURCES, num_latents_per_layer=5) if causal else acausal(SOURCES, num_latents=16)
    cc = Crosscoder(wiring, kind, seed=0)
    cc.set_normaliser(torch.full((SOURCES.width,), 2.5), torch.tensor([0.5, 1.0, 2.0]))
    set_firing_fraction(cc, rows(), 0.03)
    assert fired(cc, rows()) == [30] * cc.num_latents


@pytest.mark.parametrize("kind", [TopK(2), BatchTopK(2)], ids=["topk", "batch_topk"])
def test_top_k_is_refused(kind: TopK | BatchTopK) -> None:
    with pytest.raises(ConfigError, match="k fixes how often"):
        set_firing_fraction(Crosscoder(acausal(SOURCES, num_latents=4), kind), rows(), 0.1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-5, float("nan")])
def test_a_fraction_that_no_rows_can_show_is_refused(fraction: float) -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=4), ReLU())
    with pytest.raises(ConfigError, match="between 0 and 1"):
        set_firing_fraction(cc, rows(), fraction)


def test_bad_rows_are_refused() -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=4), ReLU())
    with pytest.raises(SourceMismatch, match="NaN"):
        set_firing_fraction(cc, torch.full((10, SOURCES.width), float("nan")), 0.5)
    with pytest.raises(ConfigError, match="folded"):
        set_firing_fraction(cc.folded(), rows(), 0.5)
