"""The family through the real trainer and real runs: every kind of block of a run file does what it says."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import crosscoder as xc
from core.definition import PAIR, family, rows, with_parameters
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, FileFormatError
from crosscoder.nonlinearities import BatchTopK, JumpReLU, Nonlinearity, ReLU, TopK
from crosscoder.training import checkpoint, runfile
from crosscoder.training.config import (
    AuxConfig,
    DeltaConfig,
    L1Sparsity,
    LossesConfig,
    NoSparsity,
    RunConfig,
    TanhSparsity,
    TrainConfig,
)
from crosscoder.training.meter import Meter
from crosscoder.training.plan import num_parameters
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal
from training.worlds import ToyWorld

RunFile = Callable[..., Path]
KINDS: dict[str, Nonlinearity] = {
    "relu": ReLU(), "jump_relu": JumpReLU(bandwidth=0.5), "topk": TopK(3), "batch_topk": BatchTopK(3),
}  # fmt: skip
SPARSITIES = {
    "none": NoSparsity(), "l1": L1Sparsity(coefficient=0.1), "tanh": TanhSparsity(coefficient=0.1),
    "l2": L1Sparsity(coefficient=0.1, code_norm="concat"),
}  # fmt: skip
AUX = AuxConfig(coefficient=0.1, dead_after_tokens=256)
EXTRAS = {
    "plain": LossesConfig(aux=AuxConfig(coefficient=0.0)),
    "aux": LossesConfig(aux=AUX),
    "dropout": LossesConfig(aux=AUX, source_dropout=0.2),
}


def pairwise(*factors: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Few combinations in which every pair of values of two factors occurs; found greedily, always the same."""
    whole = [c for c in product(*factors) if "top" not in c[1] or c[2] == "none"]  # a penalty under TopK is refused
    random.Random(0).shuffle(whole)
    indices = [(i, j) for j in range(len(factors)) for i in range(j)]
    pairs = {(i, c[i], j, c[j]) for c in whole for i, j in indices}
    found: list[tuple[str, ...]] = []
    while pairs:
        best = max(whole, key=lambda c: sum((i, c[i], j, c[j]) in pairs for i, j in indices))
        found.append(best)
        pairs -= {(i, best[i], j, best[j]) for i, j in indices}
    return found


@pytest.mark.parametrize(("wiring", "kind", "sparsity", "extra"), pairwise(family(), KINDS, SPARSITIES, EXTRAS))
def test_every_pair_of_choices_trains_twenty_steps_with_metrics_on(
    wiring: str, kind: str, sparsity: str, extra: str
) -> None:
    of = family()[wiring] if kind in ("topk", "batch_topk") else family()[wiring].without_k()
    world = ToyWorld(of.sources)
    config = TrainConfig(num_tokens=128 * 20, batch_size=128, learning_rate=3e-3)
    t = Trainer(Crosscoder(of, KINDS[kind]), config, sparsity=SPARSITIES[sparsity], losses=EXTRAS[extra])
    meter, first = Meter(t.crosscoder), None
    for batch in islice(world.batches(128), 20):
        result = t.step(batch.x)
        meter.add(result)
        first = float(result.source_errors.sum()) if first is None else first
    metrics = meter.read(t)
    assert metrics["reconstruction"] < (first or 0.0)
    assert all(value == value for value in metrics.values())
    for parameter in t.crosscoder.parameters():
        assert bool(torch.isfinite(parameter).all())


def everything(trainer: Trainer) -> dict[str, Tensor]:
    named = dict(trainer.crosscoder.state_dict())
    for name, parameter in trainer.crosscoder.named_parameters():
        named |= {f"{name}.{k}": v for k, v in trainer.optimiser.state[parameter].items()}
    return {name: tensor.nan_to_num(-1.0) for name, tensor in named.items()}


@pytest.mark.parametrize("wiring", ["designated_shared, norms", "strictly_causal", "strictly_causal, tied"])
@pytest.mark.parametrize("kind", ["jump_relu", "batch_topk"])
def test_resuming_is_exact_with_dropout_ties_and_thresholds(wiring: str, kind: str, tmp_path: Path) -> None:
    of = family()[wiring] if kind == "batch_topk" else family()[wiring].without_k()
    config = TrainConfig(num_tokens=64 * 20, batch_size=64, learning_rate=3e-3)

    def fresh(seed: int) -> Trainer:
        sparsity = TanhSparsity(coefficient=0.1) if kind == "jump_relu" else None
        extra = LossesConfig(source_dropout=0.3)
        return Trainer(Crosscoder(of, KINDS[kind], seed=seed), config, sparsity=sparsity, losses=extra, seed=3)

    whole = fresh(0)
    whole.run(ToyWorld(of.sources))
    first, world = fresh(0), ToyWorld(of.sources)
    for batch in islice(world.batches(64), 7):
        first.step(batch.x)
    checkpoint.save(first, tmp_path, stream=world.state_dict())
    second, again = fresh(9), ToyWorld(of.sources)
    again.load_state_dict(checkpoint.restore(second, checkpoint.found(tmp_path)[-1]))
    second.run(again)
    expected = everything(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in everything(second).items())


def test_source_dropout_hides_sources_from_the_encoder_and_not_from_the_loss() -> None:
    cc = with_parameters(Crosscoder(acausal(PAIR, num_latents=9), ReLU()))
    config = TrainConfig(num_tokens=6400, batch_size=4000)
    t = Trainer(cc, config, losses=LossesConfig(source_dropout=0.25), seed=1)
    reads = cc.normalise(rows(cc, 4000))

    def masked() -> Tensor:
        (mask,) = t._masks(4000, parts=1)
        assert mask is not None
        return reads * mask

    hidden = (masked().unflatten(1, (2, -1)) == 0).all(2)
    assert float(hidden.double().mean()) == pytest.approx(0.25, abs=0.02)
    both = float(hidden.all(1).double().mean())
    assert both == pytest.approx(0.0625, abs=0.02), "sources are hidden independently"
    assert torch.equal(masked(), masked()), "a function of seed and step"
    t.step_number = 1
    assert not torch.equal((masked().unflatten(1, (2, -1)) == 0).all(2), hidden)
    t.step_number = 0
    with torch.no_grad():
        expected = (reads - cc.train().decode_normalised(cc.encode_normalised(masked()))).square().sum(1).mean()
    raw = reads / cc.scale_columns(cc.sources) + cc.mean
    torch.testing.assert_close(t.step(raw).source_errors.sum(), expected)


def test_a_run_with_dropout_ends_with_thresholds_of_whole_rows(toy_run_file: RunFile, tmp_path: Path) -> None:
    """Those that followed training are of rows with sources hidden, whose scores are lower."""
    raw = runfile.read(toy_run_file(num_tokens=6400)) | {"losses": {"source_dropout": 0.5}}
    runfile.write(tmp_path / "family.yaml", raw)
    result = xc.train(RunConfig.load(tmp_path / "family.yaml"))
    assert xc.analysis.evaluate_run(result.path).l0 == pytest.approx(8, rel=0.15)


def test_a_run_starts_from_dictionaries_that_are_there(toy_run_file: RunFile, tmp_path: Path) -> None:
    """A path that is wrong is found before models are loaded."""
    start = {"warm_start": {"dictionaries": {"base": str(tmp_path / "nowhere")}}}
    with pytest.raises(FileFormatError, match="nowhere"):
        xc.train(RunConfig.load(written(toy_run_file, tmp_path, init=start)))
    assert not (tmp_path / "run").exists()


def test_the_delta_loss_is_part_of_the_step() -> None:
    cc = with_parameters(Crosscoder(acausal(PAIR, num_latents=9), TopK(2)))
    extra = LossesConfig(aux=AuxConfig(coefficient=0.0), delta=DeltaConfig(coefficient=3.0, a="base", b="chat"))
    t = Trainer(cc, TrainConfig(num_tokens=640, batch_size=64), losses=extra)
    x = rows(cc, 64)
    raw = (x - cc.train()(x)).detach().unflatten(1, (2, -1))
    expected = 3 * (raw[:, 1] - raw[:, 0]).square().sum(1).mean() * cc.scale.prod()
    result = t.step(x)
    torch.testing.assert_close(result.delta, expected.detach())
    torch.testing.assert_close(result.loss, result.source_errors.sum() + expected.detach())


# -- run files ---------------------------------------------------------------------------------------------------------

STREAM = ["base/layers.0.resid_post", "base/layers.1.resid_post", "chat/layers.0.resid_post"]
PARTS = [f"base/layers.{i}.{kind}" for i in (0, 1) for kind in ("attn_out", "resid_mid", "mlp_in", "mlp_out")]
BLOCKS = {
    "sae": (STREAM, "{kind: sae, num_latents: 40, source: base/layers.1.resid_post}", "all"),
    "transcoder": (
        PARTS[2:4],
        "{kind: transcoder, num_latents: 40, read: base/layers.0.mlp_in, write: base/layers.0.mlp_out, skip: true}",
        "all",
    ),
    "per_source": (
        STREAM,
        "{kind: per_source, num_latents_per_source: 20}",
        "base-layers-0-resid_post base-layers-1-resid_post chat-layers-0-resid_post",
    ),
    "weakly_causal": (
        STREAM,
        "{kind: weakly_causal, num_latents_per_layer: 20, reads: prefix}",
        "layers-0-resid_post layers-1-resid_post",
    ),
    "strictly_causal": (
        PARTS,
        "{kind: strictly_causal, num_latents_per_layer: 20, tied: decoder}",
        "layers-0-mlp_in layers-1-mlp_in",
    ),
    "mixed": (
        PARTS,
        "{kind: mixed, num_latents_per_layer: 20}",
        "mlp-layers-0-mlp_in mlp-layers-1-mlp_in attention-layers-0-attn_out attention-layers-1-attn_out",
    ),
    "local": (STREAM, "{kind: local, num_latents_per_layer: 20, window: 2}", "window-0"),
    "pre_post_mlp": (PARTS[1:4], "{kind: pre_post_mlp, num_latents: 40}", "all"),
    "designated_shared": (
        [STREAM[0], STREAM[2]],
        "{kind: designated_shared, shared: 20, free: 20, penalty: 1.0, k_shared: 3}",
        "shared free",
    ),
    "dedicated": (STREAM, "{kind: dedicated, shared: 20, exclusive: {base: 8, chat: 9}}", "shared base chat"),
    "combine": (
        STREAM,
        "{combine: [{kind: acausal, num_latents: 20}, {kind: sae, num_latents: 10, source: chat}]}",
        "0-all 1-all",
    ),
}


def written(toy_run_file: RunFile, tmp_path: Path, **changes: Any) -> Path:
    """The toy run with whole blocks replaced."""
    raw = runfile.read(toy_run_file(num_tokens=640)) | changes
    runfile.write(tmp_path / "family.yaml", raw)
    return tmp_path / "family.yaml"


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_wiring_of_a_run_file_trains(kind: str, toy_run_file: RunFile, tmp_path: Path) -> None:
    sources, block, groups = BLOCKS[kind]
    models = runfile.read(toy_run_file())["models"]
    used = {alias: model for alias, model in models.items() if any(s.startswith(alias) for s in sources)}
    file = written(toy_run_file, tmp_path, sources=sources, wiring=yaml.safe_load(block), models=used)
    run = RunConfig.load(file)
    again = tmp_path / "again.yaml"
    run.dump(again)
    assert RunConfig.load(again) == run
    result = xc.train(run)
    assert " ".join(group.name for group in result.crosscoder.wiring) == groups
    assert result.crosscoder.sources.keys == tuple(sources)
    cc = result.crosscoder
    assert num_parameters(cc.wiring, cc.nonlinearity) == sum(p.numel() for p in cc.parameters())
    assert result.metrics["held_out/fve"] > -1


def test_a_difference_is_a_source_of_a_run(toy_run_file: RunFile, tmp_path: Path) -> None:
    """A difference-SAE: one source, the difference of the models that are read."""
    block = {"difference": ["chat", "base"], "site": "layers.0.resid_post"}
    file = written(toy_run_file, tmp_path, sources=[block], wiring={"kind": "sae", "num_latents": 40})
    result = xc.train(RunConfig.load(file))
    assert result.crosscoder.sources.keys == ("chat-base/layers.0.resid_post",)
    assert result.crosscoder.sources.sources[0].difference == ("chat/layers.0.resid_post", "base/layers.0.resid_post")
    evaluation = xc.analysis.evaluate_run(result.path)
    assert evaluation.cross_entropy == {}
    assert evaluation.fve == pytest.approx(result.metrics["held_out/fve"], abs=0.2)


def test_a_difference_stands_beside_its_parts(toy_run_file: RunFile, tmp_path: Path) -> None:
    block = {"difference": ["chat", "base"], "site": "layers.0.resid_post"}
    sources = ["base/layers.0.resid_post", block]
    file = written(toy_run_file, tmp_path, sources=sources, wiring={"kind": "acausal", "num_latents": 40})
    result = xc.train(RunConfig.load(file))
    evaluation = xc.analysis.evaluate_run(result.path)
    assert list(evaluation.cross_entropy) == ["base/layers.0.resid_post"]
    diff = xc.analysis.diff_run(result.path, a="base", b="chat-base")
    assert sum(diff.classes.counts.values()) == 40


def test_jump_relu_by_the_published_recipe_is_a_run(toy_run_file: RunFile, tmp_path: Path) -> None:
    file = written(
        toy_run_file,
        tmp_path,
        nonlinearity={"kind": "jump_relu"},
        sparsity={"kind": "tanh", "coefficient": 1.0},
        init={"firing_fraction": 0.05},
        losses={"source_dropout": 0.05, "delta": {"a": "base", "b": "chat", "coefficient": 0.5}},
    )
    result = xc.train(RunConfig.load(file))
    assert result.crosscoder.weights[0].log_threshold is not None
    assert 0 < result.metrics["held_out/l0"] < 64


def test_a_run_can_start_from_autoencoders_of_its_sources(toy_run_file: RunFile, tmp_path: Path) -> None:
    dictionaries: dict[str, str] = {}
    raw = runfile.read(toy_run_file())
    for alias in ("base", "chat"):
        key = f"{alias}/layers.0.resid_post"
        changes = {"sources": [key], "models": {alias: raw["models"][alias]}, "out": str(tmp_path / alias)}
        changes |= {"text": raw["text"] | {"tokenizer": alias}, "wiring": {"kind": "sae", "num_latents": 32}}
        changes |= {"train": {"num_tokens": 9600, "batch_size": 64, "learning_rate": 1e-2}}
        dictionaries[key] = str(xc.train(RunConfig.load(written(toy_run_file, tmp_path, **changes))).path)
    file = written(toy_run_file, tmp_path, init={"warm_start": {"dictionaries": dictionaries}})
    warm = xc.train(RunConfig.load(file, ["train.learning_rate=1e-9", f"out={tmp_path / 'warm'}"]))
    cold = xc.train(
        RunConfig.load(file, ["train.learning_rate=1e-9", "init.warm_start=null", f"out={tmp_path / 'cold'}"])
    )
    assert warm.metrics["held_out/fve"] > cold.metrics["held_out/fve"] + 0.05


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity={kind: l1, coefficient: 1}", "expected none with nonlinearity.kind = batch_topk"),
        ("init={firing_fraction: 0.1}", "k decides how often latents fire"),
        ("train={k_start: 65}", "at most the 64 latents"),
        (
            "wiring={kind: strictly_causal, num_latents_per_layer: 4, reads: resid_post, writes: resid_post}",
            "does not read",
        ),
        ("wiring={kind: acausal, num_latents: 40, sources: [resid_post, attn_out]}", "is at attn_out"),
        ("losses={delta: {a: base, b: bas}}", "no source is called 'bas'"),
        ("losses={delta: {a: base, b: base/layers.0.resid_post}}", "two different sources"),
        ("init={warm_start: {dictionaries: {other: somewhere}}}", "no source is called 'other'"),
        ("wiring={kind: designated_shared, shared: 4, free: 4}", "is not penalised"),
        ("wiring={kind: per_source, num_latents_per_source: 4, k: 1}", "add up to"),
        ("wiring={kind: strictly_causal, num_latents_per_layer: 4}", "no source of this run is at mlp_in"),
        ("wiring={kind: dedicated, shared: 4, exclusive: {chatt: 3}}", "exclusive to models"),
        ("wiring={kind: local, num_latents_per_layer: 8, window: 3}", "window of 1 to 1"),
        ("nonlinearity={kind: jump_relu}", "expected l1 or tanh"),
        ("sources=[{difference: [chat, bas], site: layers.0.resid_post}]", "no model is called as in bas/"),
        ("wiring={kind: combine, combine: [{kind: acausl}]}", "expected 'acausal'"),
        ("losses={source_dropout: 1.0}", "less than 1"),
    ],
)
def test_blocks_that_cannot_be_are_refused_before_anything_is_loaded(
    override: str, message: str, toy_run_file: RunFile
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(toy_run_file(), [override])
    assert message in str(caught.value)
