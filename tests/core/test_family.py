"""Every wiring × nonlinearity against the definition, and what must hold for each kind of wiring."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.definition import LAYERS, PAIR, WIDTH, at, family, forward, penalised, rows, with_parameters
from crosscoder.activity import Activity
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, NotCalibrated, SourceMismatch, WiringError
from crosscoder.nonlinearities import BatchTopK, JumpReLU, Nonlinearity, ReLU, TopK
from crosscoder.sources import Source, SourceSet, difference
from crosscoder.training import losses
from crosscoder.training.config import AuxConfig, DeltaConfig, L1Sparsity, LossesConfig, TanhSparsity, TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import (
    LatentGroup,
    Wiring,
    acausal,
    combine,
    dedicated,
    designated_shared,
    local,
    per_source,
    sae,
    strictly_causal,
    transcoder,
    weakly_causal,
)

FAMILY = family()
NO_AUX = LossesConfig(aux=AuxConfig(coefficient=0.0))
KINDS: list[Nonlinearity] = [
    ReLU(),
    JumpReLU(bandwidth=0.5, initial_threshold=0.3),
    TopK(3),
    TopK(3, code_norm="max"),
    BatchTopK(3),
    BatchTopK(3, code_norm="concat"),
    BatchTopK(3, code_norm="none"),
]


def named(kind: Nonlinearity) -> str:
    return f"{kind.kind}-{kind.code_norm}"


def made(name: str, kind: Nonlinearity) -> Crosscoder:
    wiring = FAMILY[name]
    fits = isinstance(kind, TopK | BatchTopK) or all(group.k is None for group in wiring)
    return with_parameters(Crosscoder(wiring if fits else wiring.without_k(), kind))


def reads_of(cc: Crosscoder, x: Tensor) -> Tensor:
    return x[:, list(cc.sources.columns(cc.reads.keys))]


def l1(cc: Crosscoder, x: Tensor) -> Tensor:
    activity = Activity([x], [cc.encode(x)])
    return losses.sparsity(activity, cc, L1Sparsity(coefficient=1.0), coefficient=1.0)


def trainer_of(cc: Crosscoder, **settings: object) -> Trainer:
    return Trainer(cc, TrainConfig(num_tokens=64 * 40, batch_size=64, learning_rate=1e-2), **settings)


def steps(trainer: Trainer, count: int) -> None:
    for i in range(count):
        trainer.step(rows(trainer.crosscoder, 64, seed=i))


# -- against the definition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FAMILY)
def test_codes_reconstruction_and_gradients_equal_the_definition(name: str, kind: Nonlinearity, training: bool) -> None:
    cc = made(name, kind).train(training)
    x = rows(cc)
    f, y = forward(cc, x)
    mine = cc(reads_of(cc, x))
    torch.testing.assert_close(cc.encode(reads_of(cc, x)).to_dense(), f)
    torch.testing.assert_close(mine, y)
    if isinstance(kind, JumpReLU):
        return  # its thresholds have a straight-through gradient: tested against the smoothed loss
    y.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in cc.named_parameters() if p.grad is not None}
    cc.zero_grad()
    mine.square().sum().backward()
    for parameter, found in cc.named_parameters():
        torch.testing.assert_close(found.grad, expected[parameter], msg=parameter)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", [ReLU(), JumpReLU(), BatchTopK(3)], ids=named)
def test_folding_is_exact_for_every_wiring(name: str, kind: Nonlinearity) -> None:
    cc = made(name, kind).eval()
    folded, x = cc.folded(), reads_of(cc, rows(cc))
    torch.testing.assert_close(folded.encode(x).to_dense(), cc.encode(x).to_dense())
    torch.testing.assert_close(folded(x), cc(x))
    for space in ("normalised", "raw"):
        torch.testing.assert_close(folded.decoder_norms(space), cc.decoder_norms(space))
    assert all(group.tied is None for group in folded.wiring)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", [JumpReLU(), TopK(3, code_norm="max"), BatchTopK(3)], ids=named)
def test_saved_and_loaded_is_the_same_function(name: str, kind: Nonlinearity, tmp_path: Path) -> None:
    for folded in (False, True):
        cc = made(name, kind).float().eval()
        cc = cc.folded() if folded else cc
        x = reads_of(cc, rows(cc)).float()
        loaded = Crosscoder.load(cc.save(tmp_path / f"cc-{folded}"))
        assert loaded.wiring == cc.wiring
        assert loaded.nonlinearity == cc.nonlinearity
        assert torch.equal(loaded(x), cc(x))


# -- special cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ReLU(), JumpReLU(), TopK(4), BatchTopK(4)], ids=lambda k: k.kind)
def test_one_source_trains_as_an_sae_written_from_its_formula(kind: Nonlinearity) -> None:
    """Ten whole updates, Adam included, of a plain SAE with the same loss."""
    source = Source("base", "embed", 8)
    cc = with_parameters(Crosscoder(sae(source, num_latents=12), kind))
    penalty = L1Sparsity(coefficient=0.3, warmup_fraction=0.0) if isinstance(kind, ReLU) else None
    tanh = (
        TanhSparsity(coefficient=0.3, preactivation=0.05, warmup_fraction=0.0) if isinstance(kind, JumpReLU) else None
    )
    trainer = trainer_of(cc, sparsity=penalty or tanh)
    w, threshold = cc.weights[0], cc.weights[0].log_threshold
    theirs = [p.detach().clone().requires_grad_() for p in (w.encoder, w.decoder, w.encoder_bias, cc.bias)]
    if threshold is not None:
        theirs.append(threshold.detach().clone().requires_grad_())
    adam = torch.optim.Adam(theirs, lr=1e-2)
    for i in range(10):
        x = rows(cc, 64, seed=i)
        adam.param_groups[0]["lr"] = trainer.learning_rate
        adam.zero_grad()
        _sae_loss((x - cc.mean) * cc.scale, theirs, kind).backward()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adam.step()
        trainer.step(x)
    mine = [w.encoder, w.decoder, w.encoder_bias, cc.bias, *([] if threshold is None else [threshold])]
    for parameter, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(parameter, other)


def _sae_loss(x: Tensor, parameters: list[Tensor], kind: Nonlinearity) -> Tensor:
    e, d, b, c = parameters[:4]
    p, norm = x @ e.T + b, d.norm(dim=1)
    score = (p * norm).detach()
    if isinstance(kind, JumpReLU):
        theta, eps = parameters[4].exp(), kind.bandwidth
        window = ((p - theta).abs() < eps / 2).detach() * (theta - theta.detach()) * (-theta.detach() / eps)
        f = p * (p > theta) + window  # the second is zero, and carries the straight-through gradient
        silent = 0.05 * (torch.relu(theta - p) * norm).sum(1).mean()
        extra = 0.3 * torch.tanh(4 * f * norm).sum(1).mean() + silent
    elif isinstance(kind, ReLU):
        f = torch.relu(p)
        extra = 0.3 * (f * norm).sum(1).mean()
    else:
        whole = isinstance(kind, BatchTopK)
        cut = score.flatten().topk(4 * len(x)).values[-1] if whole else score.topk(4, dim=1).values[:, -1:]
        f, extra = p * (score >= cut) * (score > 0), p.new_zeros(())
    return (x - f @ d - c).square().sum(1).mean() + extra


@pytest.mark.parametrize("kind", [TopK, BatchTopK], ids=["topk", "batch_topk"])
def test_per_source_with_own_k_is_independent_saes(kind: type[TopK] | type[BatchTopK]) -> None:
    """Trained side by side without clipping, which is over all of them, they stay the SAEs trained alone."""
    sources = at("resid_post")
    cc = with_parameters(Crosscoder(per_source(sources, num_latents_per_source=9, k=2), kind(2 * LAYERS)))
    config = TrainConfig(num_tokens=64 * 20, batch_size=64, learning_rate=1e-2, gradient_clip=1e9)
    alone: list[Trainer] = []
    for i, source in enumerate(sources):
        one = with_parameters(Crosscoder(sae(source, num_latents=9), kind(2)))
        columns = sources.slices[source.key]
        with torch.no_grad():
            for name in ("encoder", "decoder", "encoder_bias", "threshold"):
                getattr(one.weights[0], name).copy_(getattr(cc.weights[i], name))
            one.bias.copy_(cc.bias[columns])
            one.set_normaliser(cc.mean[columns], cc.scale[i : i + 1])
        one.settle()
        alone.append(Trainer(one, config, losses=NO_AUX))
    together = Trainer(cc, config, losses=NO_AUX)
    for step in range(12):
        x = rows(cc, 64, seed=step)
        loss = together.step(x).loss
        parts = [t.step(x[:, sources.slices[t.crosscoder.sources.keys[0]]]).loss for t in alone]
        torch.testing.assert_close(loss, torch.stack(parts).sum())
    for i, trainer in enumerate(alone):
        for name in ("encoder", "decoder", "encoder_bias", "threshold" if kind is BatchTopK else "gate"):
            torch.testing.assert_close(getattr(cc.weights[i], name), getattr(trainer.crosscoder.weights[0], name))


def test_a_window_of_all_layers_is_acausal_and_of_one_is_per_source() -> None:
    sources = at("resid_post")
    whole = local(sources, num_latents_per_layer=6, window=LAYERS)
    assert [(g.reads, g.writes) for g in whole] == [(g.reads, g.writes) for g in acausal(sources, num_latents=6)]
    ones = local(sources, num_latents_per_layer=6, window=1)
    assert [(g.reads, g.writes) for g in ones] == [
        (g.reads, g.writes) for g in per_source(sources, num_latents_per_source=6)
    ]


# -- causality ---------------------------------------------------------------------------------------------------------


CAUSAL = ["weakly_causal", "weakly_causal, prefix", "strictly_causal", "strictly_causal, tied", "mixed"]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", [ReLU(), TopK(3)], ids=named)
def test_no_output_depends_on_a_later_input(name: str, kind: Nonlinearity) -> None:
    """The Jacobian of what is written at layer l with respect to what is read at later layers is exactly zero.

    Under TopK layers that share one k still compete for it, which no derivative shows; a k for each group ends that.
    """
    cc = made(name, kind).eval()
    x = reads_of(cc, rows(cc, 4))
    found = torch.autograd.functional.jacobian(lambda row: cc(row).sum(0), x)
    assert isinstance(found, Tensor)
    jacobian = found.sum(1)
    for out, written in cc.writes.slices.items():
        for key, read in cc.reads.slices.items():
            block = jacobian[written, read]
            if int(key.split(".")[1]) > int(out.split(".")[1]):
                assert bool((block == 0).all()), (out, key)
            elif isinstance(kind, ReLU) and any(key in g.reads and out in g.writes for g in cc.wiring):
                assert bool((block != 0).any()), (out, key)


def test_causal_wirings_store_and_multiply_the_blocks_that_exist_alone() -> None:
    sources = SourceSet(Source("base", f"layers.{i}.resid_post", 16) for i in range(12))
    whole = Crosscoder(acausal(sources, num_latents=120), BatchTopK(4))
    causal = Crosscoder(weakly_causal(sources, num_latents_per_layer=10), BatchTopK(4))
    blocks = 12 + 12 * 13 // 2  # a block to read per layer, and the upper triangle to write
    assert sum(w.encoder.numel() + w.decoder.numel() for w in causal.weights) == blocks * 10 * 16
    assert sum(w.encoder.numel() + w.decoder.numel() for w in whole.weights) == 2 * 144 * 10 * 16
    dense = {name: Crosscoder(cc.wiring, ReLU()).train() for name, cc in (("whole", whole), ("causal", causal))}
    counted: dict[str, int] = {}
    for name, cc in dense.items():
        with FlopCounterMode(display=False) as flops:
            cc(torch.randn(8, cc.sources.width)).square().sum().backward()
        counted[name] = flops.get_total_flops()
    # the encoder is multiplied for a look at how many are active, forward and for its gradient; the decoder also thrice
    assert counted["causal"] * (3 * 144 + 3 * 144) == counted["whole"] * (3 * 12 + 3 * 78)


# -- exclusive, tied, penalised ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ReLU(), JumpReLU(), BatchTopK(4)], ids=named)
def test_exclusive_latents_never_write_or_read_the_other_model(kind: Nonlinearity, tmp_path: Path) -> None:
    """Through Adam, clipping, weight decay, folding, saving: there is nothing that could drift."""
    cc = with_parameters(Crosscoder(dedicated(PAIR, shared=9, exclusive={"base": 4, "chat": 5}), kind))
    penalty = {"relu": L1Sparsity(coefficient=0.1), "jump_relu": TanhSparsity(coefficient=1.0)}
    trainer = trainer_of(cc, sparsity=penalty.get(kind.kind))
    for group in trainer.optimiser._adam.param_groups:
        group["weight_decay"] = 0.1
    steps(trainer, 20)
    cc.calibrate([rows(cc, 500)])
    loaded = Crosscoder.load(cc.float().eval().save(tmp_path / "cc"))
    for found in (cc.eval(), cc.folded(), loaded, loaded.folded()):
        norms = found.decoder_norms()
        assert norms[9:13, 1].tolist() == [0] * 4
        assert norms[13:, 0].tolist() == [0] * 5
        assert bool((norms[:9] > 0).all())
        x = rows(found, 30).float()
        other = torch.cat([x[:, :WIDTH], x[:, WIDTH:] + 100], 1)
        torch.testing.assert_close(found.encode(other).to_dense()[:, 9:13], found.encode(x).to_dense()[:, 9:13])
        only_chat = found.encode(x).to_dense()
        only_chat[:, :13] = 0
        silent = SparseCode.from_dense(torch.zeros_like(only_chat))
        same = found.decode(SparseCode.from_dense(only_chat))[:, :WIDTH]
        torch.testing.assert_close(same, found.decode(silent)[:, :WIDTH], rtol=0, atol=0)
    assert not cc.wiring.writes_mask[9:13, 1].any()


@pytest.mark.parametrize("tied", ["decoder", "norm"])
@pytest.mark.parametrize("kind", [ReLU(), BatchTopK(4)], ids=named)
def test_tied_decoders_stay_tied_after_every_step(tied: str, kind: Nonlinearity) -> None:
    cc = with_parameters(Crosscoder(designated_shared(PAIR, shared=6, free=9, penalty=1.0, tied=tied), kind))
    trainer = trainer_of(cc, sparsity=L1Sparsity(coefficient=0.1) if isinstance(kind, ReLU) else None)
    for i in range(10):
        trainer.step(rows(cc, 64, seed=i))
        a, b = (cc.decoder_rows(key) for key in PAIR.keys)
        torch.testing.assert_close(a[:6].norm(dim=1), b[:6].norm(dim=1), rtol=1e-12, atol=0)
        assert torch.equal(a[:6], b[:6]) == (tied == "decoder")
        assert not torch.equal(a[6:], b[6:])


def test_a_latent_without_a_direction_at_one_source_keeps_the_other() -> None:
    cc = Crosscoder(designated_shared(PAIR, shared=4, free=4, penalty=1.0, tied="norm"), TopK(2))
    with torch.no_grad():
        cc.weights[0].decoder[0, :WIDTH] = 0
    for _ in range(5):
        cc.settle()
    torch.testing.assert_close(cc.decoder_norms()[0], torch.tensor([0.0, 0.3]))


def test_the_gradient_of_a_tied_decoder_is_the_sum_over_its_copies() -> None:
    wiring = strictly_causal(at("mlp_in"), at("mlp_out"), num_latents_per_layer=4, tied="decoder")
    tied = with_parameters(Crosscoder(wiring, TopK(2)))
    free = with_parameters(Crosscoder(tied.wiring.untied(), TopK(2)))
    with torch.no_grad():
        for mine, theirs, layout in zip(tied.weights, free.weights, tied.layouts, strict=True):
            theirs.decoder.copy_(layout.expanded(mine.decoder))
            theirs.encoder.copy_(mine.encoder)
            theirs.encoder_bias.copy_(mine.encoder_bias)
        free.bias.copy_(tied.bias)
        free.set_normaliser(tied.mean, tied.scale)
    free.settle()
    x = rows(tied)[:, list(tied.sources.columns(tied.reads.keys))]
    for cc in (tied, free):
        cc.train()(x).square().sum().backward()
    for mine, theirs in zip(tied.weights, free.weights, strict=True):
        copies = theirs.decoder.grad.split(WIDTH, dim=1)
        torch.testing.assert_close(mine.decoder.grad, torch.stack(copies).sum(0))


def test_a_penalty_multiplies_the_coefficient_of_its_group() -> None:
    cc = with_parameters(Crosscoder(penalised(), ReLU()))
    x = rows(cc)
    f, _ = forward(cc, x)
    weights = torch.tensor([0.25] * 6 + [1.0] * 9).double()
    expected = 0.7 * (f * cc.decoder_norms().sum(1) * weights).sum(1).mean()
    activity = cc.train().activity(cc.normalise(x))
    torch.testing.assert_close(losses.sparsity(activity, cc, L1Sparsity(coefficient=1.0), coefficient=0.7), expected)
    expected = 0.7 * (torch.tanh(4 * f * cc.decoder_norms().sum(1)) * weights).sum(1).mean()
    tanh = TanhSparsity(coefficient=1.0)
    torch.testing.assert_close(losses.sparsity(activity, cc, tanh, coefficient=0.7), expected)


def test_l1_of_norms_exceeds_l2_of_norms_by_the_root_of_the_number_of_sources() -> None:
    sources = at("resid_post")
    cc = Crosscoder(acausal(sources, num_latents=7), ReLU())  # drawn with the same norm at every source
    activity = cc.train().activity(torch.rand(20, sources.width))
    found = {
        norm: losses.sparsity(activity, cc, L1Sparsity(coefficient=1.0, code_norm=norm), coefficient=1.0)
        for norm in ("sum", "concat", "max", "none")
    }
    torch.testing.assert_close(found["sum"], found["concat"] * LAYERS**0.5)
    torch.testing.assert_close(found["sum"], found["max"] * LAYERS)
    torch.testing.assert_close(found["none"], activity.code.values.sum() / 20)


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("name", ["acausal", "designated_shared", "dedicated", "strictly_causal, tied"])
def test_rescaling_a_latent_changes_neither_reconstruction_nor_penalty(name: str, kind: Nonlinearity) -> None:
    """W_enc, b_enc and θ by a, W_dec by 1/a. A gate of 1 is what it does change: selection then depends on scale."""
    cc = made(name, kind).train()
    x = reads_of(cc, rows(cc))
    before = cc(x)
    penalty = l1(cc, x)
    with torch.no_grad():
        for weights in cc.weights:
            factor = torch.rand(len(weights.gate), 1, dtype=torch.float64) + 0.5
            weights.encoder.mul_(factor)
            weights.encoder_bias.mul_(factor[:, 0])
            weights.decoder.div_(factor)
            if weights.log_threshold is not None:
                weights.log_threshold.add_(factor[:, 0].log())
    cc.settle()
    same = kind.code_norm != "none"
    assert torch.allclose(cc(x), before) == same
    assert torch.allclose(l1(cc, x), penalty) == same


# -- JumpReLU ----------------------------------------------------------------------------------------------------------


def test_the_threshold_gradient_is_the_derivative_of_the_smoothed_loss() -> None:
    """Finite differences of `Σ c · E_u f(p + u)`, u uniform over the window, in closed form, for the log-threshold."""
    kind = JumpReLU(bandwidth=0.8)
    cc = with_parameters(Crosscoder(acausal(PAIR, num_latents=6), kind)).train()
    x, c = cc.normalise(rows(cc, 400)), torch.randn(400, 6, dtype=torch.float64)
    activity = cc.activity(x)
    assert activity.f is not None
    (activity.f * c).sum().backward()
    p = activity.pre[0].detach()
    theta = cc.weights[0].log_threshold

    def smoothed(log_threshold: Tensor) -> Tensor:
        low, high = p - kind.bandwidth / 2, p + kind.bandwidth / 2
        start = torch.maximum(low, log_threshold.exp().expand_as(p)).minimum(high)
        return ((high.square() - start.square()) / (2 * kind.bandwidth) * c).sum(0)

    h = 1e-5
    slope = (smoothed(theta.detach() + h) - smoothed(theta.detach() - h)) / (2 * h)
    torch.testing.assert_close(theta.grad, slope, rtol=1e-3, atol=1e-4)
    silent = (p < theta.exp()) & (p > theta.exp() - kind.bandwidth / 2)
    assert bool(silent.any()), "silent latents near their threshold take part"


def test_the_preactivation_penalty_reaches_latents_that_never_fire() -> None:
    cc = with_parameters(Crosscoder(acausal(PAIR, num_latents=6), JumpReLU())).train()
    with torch.no_grad():
        cc.weights[0].encoder_bias.fill_(-50.0)
    activity = cc.activity(cc.normalise(rows(cc)))
    assert activity.code.num_active == 0
    losses.sparsity(activity, cc, TanhSparsity(coefficient=1.0), coefficient=1.0).backward()
    slope = cc.weights[0].encoder_bias.grad
    assert slope is not None and bool((slope < 0).all()), "descending raises the biases"
    x, w = cc.normalise(rows(cc)), cc.weights[0]
    p, theta = torch.addmm(w.encoder_bias, x, w.encoder.T).detach(), w.log_threshold.detach().exp()
    norms = cc.decoder_norms().sum(1)
    expected = 3e-6 * ((theta - p) * norms).sum(1).mean()
    found = losses.sparsity(activity, cc, TanhSparsity(coefficient=1.0), coefficient=0.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["acausal", "designated_shared, norms", "per_source, own k"])
def test_a_batch_top_k_crosscoder_becomes_a_jump_relu_one(name: str, tmp_path: Path) -> None:
    cc = made(name, BatchTopK(3)).eval()
    x = rows(cc, 500)
    jumps = cc.as_jumprelu()
    assert jumps.encode(x).to_dense().count_nonzero() > 0
    torch.testing.assert_close(jumps.encode(x).to_dense(), cc.encode(x).to_dense())
    torch.testing.assert_close(jumps(x), cc(x))
    loaded = Crosscoder.load(jumps.float().save(tmp_path / "jumps"))
    assert torch.equal(loaded(x.float()), jumps(x.float()))
    with pytest.raises(ConfigError, match="only BatchTopK"):
        jumps.as_jumprelu()
    with pytest.raises(NotCalibrated):
        Crosscoder(FAMILY["acausal"], BatchTopK(3)).as_jumprelu()


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_every_budget_is_kept_exactly_and_calibrated_on_its_own() -> None:
    groups = [LatentGroup("a", 40, PAIR.keys, PAIR.keys, k=2), LatentGroup("b", 30, PAIR.keys, PAIR.keys),
              LatentGroup("c", 30, PAIR.keys[:1], PAIR.keys)]  # fmt: skip
    cc = with_parameters(Crosscoder(Wiring(PAIR, groups), BatchTopK(5)))
    x = rows(cc, 4000)
    reads = reads_of(cc, x)
    code = cc.train().encode(reads)
    own = int((code.latents < 40).sum())
    assert (own, code.num_active - own) == (2 * 4000, 3 * 4000)
    cc.calibrate(reads.split(500))
    cc.eval()
    fresh = cc.encode(reads_of(cc, rows(cc, 4000, seed=9)))
    own = int((fresh.latents < 40).sum()) / 4000
    assert own == pytest.approx(2, rel=0.05)
    assert fresh.l0 - own == pytest.approx(3, rel=0.05)
    thresholds = [float(w.threshold) for w in cc.weights]
    assert thresholds[0] != thresholds[1] == thresholds[2]


def test_an_annealed_k_scales_every_budget() -> None:
    cc = with_parameters(Crosscoder(per_source(at("resid_post"), num_latents_per_source=9, k=1), BatchTopK(LAYERS)))
    code = cc.train().encode_normalised(rows(cc, 100), k=3 * LAYERS)
    assert [int(((code.latents >= i * 9) & (code.latents < i * 9 + 9)).sum()) for i in range(LAYERS)] == [300] * 3


# -- delta, dropout, differences -------------------------------------------------------------------------------------


def test_the_delta_loss_is_the_error_of_the_raw_difference() -> None:
    cc = with_parameters(Crosscoder(acausal(PAIR, num_latents=9), TopK(2))).train()
    x = rows(cc)
    normalised = cc.normalise(x)
    error = normalised - cc.decode_normalised(cc.encode_normalised(normalised))
    raw = x - cc(x)
    gap = (raw[:, WIDTH:] - raw[:, :WIDTH]).square().sum(1).mean() * cc.scale.prod()
    torch.testing.assert_close(losses.delta(error, cc, a="base", b="chat"), gap)
    with pytest.raises(SourceMismatch, match="one width"):
        losses.delta(error, cc, a="base", b="base")
    unlike = Crosscoder(FAMILY["dedicated"], BatchTopK(3))
    delta = LossesConfig(delta=DeltaConfig(a="base", b="chat"))
    with pytest.raises(SourceMismatch, match="one width"):
        trainer_of(unlike, losses=delta)


def test_a_difference_is_taken_where_rows_are_packed() -> None:
    derived = SourceSet([PAIR.sources[0], difference(PAIR.sources[1], PAIR.sources[0])])
    assert derived.keys[1] == "chat-base/layers.1.resid_post"
    assert derived.underlying.keys == PAIR.keys
    a, b = torch.randn(2, 4, WIDTH)
    x = derived.derive({PAIR.keys[0]: a, PAIR.keys[1]: b})
    assert torch.equal(x, torch.cat([a, b - a], 1))
    with pytest.raises(SourceMismatch, match="not of other differences"):
        difference(derived.sources[1], PAIR.sources[0])
    with pytest.raises(SourceMismatch, match="of one width"):
        difference(PAIR.sources[0], Source("chat", "layers.1.resid_post", WIDTH + 1))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_contradictions_are_refused_with_what_to_do() -> None:
    key, other = PAIR.keys
    with pytest.raises(WiringError, match="not there"):
        Wiring(PAIR, [LatentGroup("a", 4, ("base/layers.9.resid_post",), (key,))])
    with pytest.raises(WiringError, match="not there"):
        Wiring(PAIR, [LatentGroup("a", 4, (key,), ("base/layers.9.resid_post",))])
    with pytest.raises(WiringError, match="at least one latent"):
        LatentGroup("a", 0, (key,), (key,))
    with pytest.raises(WiringError, match="at least one source each"):
        LatentGroup("a", 4, (), (key,))
    with pytest.raises(WiringError, match="names to differ"):
        combine(acausal(PAIR, num_latents=4), acausal(PAIR, num_latents=4))
    with pytest.raises(WiringError, match="1 <= k"):
        LatentGroup("a", 4, (key,), (key,), k=5)
    with pytest.raises(WiringError, match="at most the 4 latents"):
        Crosscoder(acausal(PAIR, num_latents=4), BatchTopK(5))
    with pytest.raises(WiringError, match="add up to"):
        Crosscoder(per_source(PAIR, num_latents_per_source=4, k=1), BatchTopK(3))
    with pytest.raises(WiringError, match="leave something"):
        Crosscoder(designated_shared(PAIR, shared=4, free=4, penalty=1.0, k_shared=3), TopK(3))
    with pytest.raises(WiringError, match="no use for"):
        Crosscoder(per_source(PAIR, num_latents_per_source=4, k=1), ReLU())
    with pytest.raises(WiringError, match="is not penalised"):
        Crosscoder(designated_shared(PAIR, shared=4, free=4), BatchTopK(2))
    with pytest.raises(WiringError, match="penalty above 0"):
        LatentGroup("a", 4, (key,), (key,), penalty=0.0)
    unequal = SourceSet([PAIR.sources[0], Source("chat", "layers.1.resid_post", 9)])
    with pytest.raises(WiringError, match='tied="norm"'):
        designated_shared(unequal, shared=4, free=4)
    with pytest.raises(WiringError, match="identity"):
        LatentGroup("a", 4, (key,), (key, other), skip=(key,))
    with pytest.raises(WiringError, match="identity"):
        LatentGroup("a", 4, (key,), (key,), skip=True)
    with pytest.raises(WiringError, match="exclusive to models"):
        dedicated(PAIR, shared=4, exclusive={"chatt": 3})
    with pytest.raises(WiringError, match="comes at or after"):
        strictly_causal(at("resid_post"), at("mlp_in"), num_latents_per_layer=3)
    with pytest.raises(WiringError, match="window of 1 to 3"):
        local(at("resid_post"), num_latents_per_layer=3, window=4)
    with pytest.raises(WiringError, match="one thing in one wiring"):
        combine(sae(PAIR.sources[0], num_latents=2), sae(Source("base", "layers.1.resid_post", 6), num_latents=2))


def test_decoding_a_code_without_its_reads_says_why_an_affine_path_needs_them() -> None:
    cc = made("transcoder with skip", TopK(3)).eval()
    x = reads_of(cc, rows(cc))
    with pytest.raises(SourceMismatch, match="affine paths"):
        cc.decode(cc.encode(x))
    torch.testing.assert_close(cc.decode(cc.encode(x), x), cc(x))


def test_weakly_causal_groups_models_at_one_site_into_one_step() -> None:
    sources = at("resid_post", models=("base", "chat"))
    wiring = weakly_causal(sources, num_latents_per_layer=2)
    assert [len(group.reads) for group in wiring] == [2, 2, 2]
    assert [len(group.writes) for group in wiring] == [6, 4, 2]
    assert wiring.groups[1].name == "layers-1-resid_post"


def test_activity_is_dense_only_where_it_must_be() -> None:
    found = {kind.kind: made("acausal", kind).train().activity(rows(made("acausal", kind))) for kind in KINDS}
    assert {name: activity.f is not None for name, activity in found.items()} == {
        "relu": True, "jump_relu": True, "topk": False, "batch_topk": False,
    }  # fmt: skip
    assert isinstance(found["topk"], Activity)


def test_transcoders_predict_and_do_not_see_their_target() -> None:
    cc = made("transcoder with skip", ReLU())
    x = rows(cc)
    other = x.clone()
    other[:, WIDTH:] += 3
    assert torch.equal(cc(reads_of(cc, x)), cc(reads_of(cc, other)))
    steps(trainer := trainer_of(cc, sparsity=L1Sparsity(coefficient=0.01)), 3)
    assert all(bool(p.grad is None) for p in trainer.crosscoder.parameters())
    assert cc.weights[0].skip is not None and bool((cc.weights[0].skip != 0).any())
    assert list(islice(cc.writes, 1))[0].site == "layers.0.mlp_out"
    assert transcoder(cc.sources.sources[0], cc.sources.sources[1], num_latents=3).groups[0].skips == ()
