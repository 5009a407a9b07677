"""ReLU and JumpReLU on few pairs: the same values, losses and gradients as from full matrices, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.test_family import PAIR, made, rows, with_parameters
from crosscoder.crosscoder import Crosscoder
from crosscoder.kernels import dispatch
from crosscoder.nonlinearities import JumpReLU, Nonlinearity, ReLU
from crosscoder.training import losses
from crosscoder.training.config import L1Sparsity, TanhSparsity
from crosscoder.wiring import acausal, designated_shared

KINDS = [ReLU(), JumpReLU(bandwidth=0.3, initial_threshold=0.4)]
PENALTIES = [L1Sparsity(coefficient=1.0), TanhSparsity(coefficient=1.0, preactivation=0.05)]
WIRINGS = {
    "acausal": acausal(PAIR, num_latents=150),
    "shared": designated_shared(PAIR, shared=40, free=90, penalty=0.3),
}


def rarely_active(name: str, kind: Nonlinearity) -> Crosscoder:
    cc = with_parameters(Crosscoder(WIRINGS[name], kind)).train()
    x = cc.normalise(rows(cc, 300))
    with torch.no_grad():
        for weights in cc.weights:
            pre = x @ weights.encoder.T
            weights.encoder_bias.copy_(0.2 - pre.quantile(0.97, dim=0))
    return cc


def gradients(cc: Crosscoder, x: Tensor, penalty: L1Sparsity | TanhSparsity) -> dict[str, Tensor]:
    x = cc.normalise(x).requires_grad_()
    activity = cc.activity(x)
    fit = cc.fit(activity, x, x.detach() * 1.1)
    loss = fit.total + losses.sparsity(activity, cc, penalty, coefficient=0.3)
    cc.zero_grad()
    loss.backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in cc.named_parameters() if p.grad is not None}
    return found | {"x": x.grad, "loss": loss.detach(), "code": activity.code.to_dense().detach()}


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: p.kind)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
@pytest.mark.parametrize("name", WIRINGS)
def test_few_active_pairs_give_what_full_matrices_give(
    name: str, kind: Nonlinearity, penalty: L1Sparsity | TanhSparsity, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc = rarely_active(name, kind)
    x = rows(cc, 300)
    activity = cc.activity(cc.normalise(x))
    assert activity.f is None and 0 < activity.code.num_active < 300 * 150 / 16
    sparse = gradients(cc, x, penalty)
    monkeypatch.setattr(dispatch, "dense", lambda share: True)
    assert cc.activity(cc.normalise(x)).f is not None
    dense = gradients(cc, x, penalty)
    assert sparse.keys() == dense.keys()
    for key, expected in dense.items():
        torch.testing.assert_close(sparse[key], expected, msg=lambda text, key=key: f"{key}: {text}")


def test_silent_pairs_in_the_window_move_the_threshold_and_are_in_no_code() -> None:
    cc = rarely_active("acausal", KINDS[1])
    activity = cc.activity(cc.normalise(rows(cc, 300)))
    (group,) = activity.groups
    assert bool((group.values == 0).any())
    assert activity.code.num_active == int(activity.num_active) == int((group.values > 0).sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_a_code_that_is_not_sparse_is_decoded_in_full_matrices(kind: Nonlinearity) -> None:
    cc = made("acausal", kind).eval()
    x = rows(cc)
    code = cc.encode(x)
    assert dispatch.dense(code.l0 / cc.num_latents)
    torch.testing.assert_close(cc.decode(code), cc.decode(code.active()))
    torch.testing.assert_close(cc.decode_normalised(code), cc.decode_normalised(code.to_dense()))
