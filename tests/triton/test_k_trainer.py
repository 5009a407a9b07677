"""Training steps of the real trainer on this backend against the same steps in torch operations.

Operations, selections and the optimiser pass are Triton's, as on a CUDA device; the tensors are on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import crosscoder as xc
from crosscoder.kernels import dispatch
from crosscoder.kernels.dispatch import TORCH
from crosscoder.kernels.triton.backend import TRITON
from crosscoder.nonlinearities import Nonlinearity
from crosscoder.training.config import AuxConfig, L1Sparsity, LossesConfig, TanhSparsity

SOURCES = xc.SourceSet([xc.Source(model, "layers.3.resid_post", 12) for model in ("base", "chat")])
WIRINGS = {
    "acausal": xc.wiring.acausal(SOURCES, num_latents=30),
    "per source": xc.wiring.per_source(SOURCES, num_latents_per_source=15),
    "tied": xc.wiring.designated_shared(SOURCES, shared=10, free=12, penalty=1.0, tied="norm"),
}
KINDS = [xc.BatchTopK(k=3), xc.TopK(k=3), xc.ReLU(), xc.JumpReLU(bandwidth=0.3, initial_threshold=0.4)]
PENALTIES = {"relu": L1Sparsity(coefficient=0.1), "jump_relu": TanhSparsity(coefficient=0.1, preactivation=0.01)}
AUX = LossesConfig(aux=AuxConfig(dead_after_tokens=20))


def steps(wiring: xc.Wiring, nonlinearity: Nonlinearity, precision: str) -> dict[str, Tensor]:
    cc = xc.Crosscoder(wiring, nonlinearity, seed=0)
    config = xc.TrainConfig(batch_size=10, num_tokens=1000, learning_rate=1e-2, precision=precision)  # pyright: ignore
    trainer = xc.Trainer(cc, config, losses=AUX, sparsity=PENALTIES.get(nonlinearity.kind))
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(4, 10, 24, generator=g)
    for x in batches[:3]:
        trainer.check(trainer.step(x))
    result = trainer.step(batches[3])
    found = dict(cc.named_parameters()) | {
        "gate": cc.gate,
        "code": result.code.to_dense(),
        "norm": result.gradient_norm,
    }
    cc.calibrate(list(batches))
    return found | {"threshold": cc.weights[0].threshold, "eval": cc.eval().encode(batches[3]).to_dense()}


@pytest.mark.parametrize(
    ("name", "precision"), [("acausal", "float32"), ("acausal", "mixed"), ("per source", "mixed"), ("tied", "mixed")]
)
@pytest.mark.parametrize("nonlinearity", KINDS, ids=lambda n: n.kind)
def test_steps_are_those_of_torch(
    name: str, nonlinearity: Nonlinearity, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "dense", lambda share: False)
    expected = steps(WIRINGS[name], nonlinearity, precision)
    asked: list[str] = []

    def triton(like: Tensor, kernels: str) -> dispatch.Backend:
        asked.append(kernels)
        return TRITON

    monkeypatch.setattr(dispatch, "backend", triton)
    for key, own in steps(WIRINGS[name], nonlinearity, precision).items():
        torch.testing.assert_close(
            own, expected[key], rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert asked


def test_fp64_and_other_devices_are_torchs() -> None:
    assert dispatch.backend(torch.zeros(1), "auto") is TORCH
    meta = torch.zeros(1, device="meta")
    assert dispatch.backend(meta, "auto") is TORCH
    assert dispatch._backend("cuda", torch.float64, "auto") is TORCH
    assert dispatch._backend("cuda", torch.float32, "torch") is TORCH
    assert dispatch._backend("cuda", torch.float32, "auto") is TRITON
