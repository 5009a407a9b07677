"""Training steps of the real trainer on this backend against the same steps in torch operations."""

from __future__ import annotations

import pytest
import torch

import crosscoder as xc
from crosscoder.kernels import dispatch
from crosscoder.kernels.triton import operations

SOURCES = xc.SourceSet([xc.Source(model, "layers.3.resid_post", 12) for model in ("base", "chat")])
WIRINGS = {
    "acausal": xc.wiring.acausal(SOURCES, num_latents=30),
    "per source": xc.wiring.per_source(SOURCES, num_latents_per_source=15),
}


def trained(wiring: xc.Wiring, nonlinearity: xc.BatchTopK | xc.TopK) -> list[torch.Tensor]:
    cc = xc.Crosscoder(wiring, nonlinearity, seed=0)
    trainer = xc.Trainer(cc, xc.TrainConfig(batch_size=10, num_tokens=1000, learning_rate=1e-2))
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        trainer.step(torch.randn(10, 24, generator=g))
    return [parameter.detach() for parameter in cc.parameters()]


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("nonlinearity", [xc.BatchTopK(k=3), xc.TopK(k=3)])
def test_steps_are_those_of_torch(
    name: str, nonlinearity: xc.BatchTopK | xc.TopK, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(WIRINGS[name], nonlinearity)
    asked: list[str] = []

    def triton_operations(device_type: str) -> object:
        asked.append(device_type)
        return operations

    monkeypatch.setattr(dispatch, "operations", triton_operations)
    for own, other in zip(trained(WIRINGS[name], nonlinearity), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert asked
