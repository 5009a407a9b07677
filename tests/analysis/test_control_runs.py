"""Controls of a whole run: which runs they are, that they are resumed and skipped, and what they are said to say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from crosscoder.analysis.control_plan import Control, WantedControls, equal_latents
from crosscoder.analysis.control_runs import plan_controls, run_controls
from crosscoder.analysis.diff_cards import Unmeasured
from crosscoder.analysis.opened_run import open_run
from crosscoder.analysis.pair_controls import PairControls, read_controls
from crosscoder.analysis.runs import diff_run, evaluate_run
from crosscoder.analysis.tables import read_table
from crosscoder.errors import (
    ConfigError,
    FileFormatError,
    ModelNotFound,
    RunConflict,
    SourceMismatch,
    UnknownKey,
    UnknownSource,
)
from crosscoder.sources import Source, SourceSet
from crosscoder.training.config import RunConfig
from crosscoder.training.run import train
from crosscoder.training.runfile import validate
from crosscoder.wiring import acausal, dedicated, strictly_causal

SITE = "layers.0.resid_post"
BASE, CHAT = f"base/{SITE}", f"chat/{SITE}"


@pytest.fixture(scope="module")
def config(toy_base_path: Path, toy_chat_path: Path, toy_text_path: Path, tmp_path_factory) -> RunConfig:
    """A run of a few steps on the toy pair."""
    raw = {
        "models": {
            "base": {"path": str(toy_base_path), "dtype": "float32"},
            "chat": {"path": str(toy_chat_path), "dtype": "float32"},
        },
        "sources": [BASE, CHAT],
        "text": {
            "tokenizer": "base",
            "context_length": 64,
            "packing": "document",
            "mix": [{"dataset": str(toy_text_path)}],
            "held_out": {"fraction": 0.3, "num_tokens": 1000},
        },
        "activations": {"buffer_gb": 0.001},
        "normaliser": {"num_tokens": 512},
        "wiring": {"kind": "acausal", "num_latents": 48},
        "nonlinearity": {"kind": "batch_topk", "k": 4},
        "train": {"num_tokens": 2560, "batch_size": 256, "learning_rate": 1e-3},
        "out": str(tmp_path_factory.mktemp("runs") / "toy"),
    }
    return validate(RunConfig, raw, name="toy run")


@pytest.fixture(scope="module")
def everything(config: RunConfig, toy_base_path: Path) -> tuple[Path, PairControls]:
    """The finished run with one control of every kind, and null seeds enough to calibrate and to test."""
    path = train(config).path
    wanted = WantedControls(
        ("null", "identical", "repeat", "baselines"), seeds=3, partners={"chat": str(toy_base_path)}
    )
    return path, run_controls(path, wanted)


def planned(path: Path, wanted: WantedControls) -> dict[str, Control]:
    return {control.name: control for control in plan_controls(path, wanted)}


def test_every_control_is_an_ordinary_run_in_its_place(everything: tuple[Path, PairControls]) -> None:
    """Directories, what each changes of the run, and what it does not."""
    path, found = everything
    names = [result.name for result in found.runs]
    assert names == sorted(
        ["difference-base--chat", "identical-base--chat", "null-base--chat-1", "null-base--chat-2", "null-base--chat-3"]
        + ["partner-chat-base", "repeat-1", "repeat-2", "repeat-3", "sae-base", "sae-chat"]
    )
    real = RunConfig.load(path / "run.yaml")
    own = {"out", "seed"}
    for name in names:
        control = RunConfig.load(path / "controls" / name / "run.yaml")
        changed = {d.key.split(".")[0] for d in control.differences(real)} - own
        kind = name.split("-")[0]
        expected = {"null": {"activations"}, "identical": {"activations"}, "partner": {"models"}, "repeat": set[str]()}
        assert changed == expected.get(kind, {"sources", "wiring"}), name
        assert control.train == real.train and control.text == real.text
        opened = open_run(path / "controls" / name)
        assert all(torch.isfinite(batch.x).all() for batch in opened.activations().contexts())
    seeds = {result.name: RunConfig.load(path / "controls" / result.name / "run.yaml").seed for result in found.runs}
    assert [seeds[f"null-base--chat-{n}"] for n in (1, 2, 3)] == [1, 2, 3] == [seeds[f"repeat-{n}"] for n in (1, 2, 3)]
    assert seeds["partner-chat-base"] == seeds["sae-base"] == seeds["identical-base--chat"] == real.seed == 0


def test_controls_can_be_evaluated_like_any_run(everything: tuple[Path, PairControls], tmp_path: Path) -> None:
    """Of a null pair without cross-entropy: no model makes the made-up source."""
    copy = shutil.copytree(everything[0] / "controls" / "null-base--chat-1", tmp_path / "null")
    evaluation = evaluate_run(copy, num_ce_tokens=100)
    assert evaluation.cross_entropy == {} and evaluation.num_rows > 0


def test_a_diff_of_a_control_leaves_the_models_alone(everything: tuple[Path, PairControls], tmp_path: Path) -> None:
    """No model makes the made-up source: nothing is patched or ablated, and the report says why."""
    copy = shutil.copytree(everything[0] / "controls" / "null-base--chat-1", tmp_path / "null")
    diff = diff_run(copy)
    assert isinstance(diff.patching, Unmeasured) and isinstance(diff.effects, Unmeasured)
    assert "Not measured: no model gives one of the sources" in diff.report.read_text()
    with pytest.raises(ConfigError, match="a control itself"):
        plan_controls(copy, WantedControls(("null",), seeds=1))


def test_null_seeds_are_halved_into_calibration_and_test(everything: tuple[Path, PairControls]) -> None:
    """Two calibrate, one tests; counts agree with the scores that lie beside the runs."""
    path, found = everything
    assert (found.calibration_seeds, found.test_seeds) == ((1, 2), (3,)) and found.calibrated
    assert [(s.cut.score, s.cut.side) for s in found.scores] == [
        (name, side) for name in ("norm", "scaling", "joint") for side in ("a", "b")
    ]
    file = f"base.{SITE}--chat.{SITE}.parquet"

    def scores(directory: Path, column: str) -> torch.Tensor:
        table = read_table(directory / "specificity" / file, thing="specificity")
        return torch.tensor([v for v in table[column].to_pylist() if v is not None], dtype=torch.float64)

    for score in found.scores:
        column = f"{score.cut.score}/{score.cut.side}"
        made_up = f"{score.cut.score}/b"  # what is made up of a null pair is b: either side is judged by it
        pooled = torch.cat([scores(path / "controls" / f"null-base--chat-{n}", made_up) for n in (1, 2)])
        assert score.cut.num_latents == len(pooled)
        assert score.cut.value == float(pooled.max()) and not score.cut.assured  # some 90 latents are too few
        unseen = scores(path / "controls" / "null-base--chat-3", made_up)
        assert score.test is not None and score.test.false_share.num_latents == len(unseen)
        assert score.test.false_share.num_found == int((unseen > score.cut.value).sum())
        assert score.test.false_share.upper_by_seeds is None
        assert score.pair.num_beyond == int((scores(path, column) > score.cut.value).sum())
        assert [count.run for count in score.repeats] == ["repeat-1", "repeat-2", "repeat-3"]
        assert [count.run for count in score.partners] == ["partner-chat-base"]
        assert sum(score.histogram) == len(scores(path, column))
    assert found.band is not None and found.beyond_band is not None and found.null_beyond_band is not None
    assert any("One null seed tests" in note for note in found.notes)


def test_an_identical_copy_has_nothing_beyond_any_cut(everything: tuple[Path, PairControls]) -> None:
    """Equal sources and equal initial weights stay equal: relative norm ½, scaling 0."""
    path, found = everything
    assert all(score.identical is not None and score.identical.num_beyond == 0 for score in found.scores)
    table = read_table(
        path / "controls" / "identical-base--chat" / "specificity" / f"base.{SITE}--chat.{SITE}.parquet",
        thing="specificity",
    )
    live = [row for row in table.to_pylist() if row["live"]]
    assert live and all(row["relative_norm"] == pytest.approx(0.5, abs=1e-6) for row in live)
    assert all(row["scaling/a"] < 1e-3 and row["scaling/b"] < 1e-3 for row in live)
    note = next(note for note in found.notes if note.startswith("Identical copy"))
    assert "relative norms from 0.5000 to 0.5000; no latent lies beyond any cut" in note


def test_stability_and_baselines_are_there(everything: tuple[Path, PairControls]) -> None:
    """A repeat of a few steps matches some latents; the difference SAE has twice the latents, the others as many."""
    _, found = everything
    assert [each.run for each in found.stability] == ["repeat-1", "repeat-2", "repeat-3"]
    for each in found.stability:
        assert each.share_by_decoder is not None and 0 <= each.share_by_decoder <= 1
        assert each.share_by_activation is not None
        assert all(each.beyond_again[key] <= each.beyond[key] for key in each.beyond)
    sizes = {result.name: result.num_latents for result in found.runs}
    assert (sizes["difference-base--chat"], sizes["sae-base"], sizes["sae-chat"]) == (96, 48, 48)
    assert found.first_tokens is not None and found.first_tokens.readings is not None
    assert found.components is not None and sum(found.components.shares) <= 1 + 1e-6


def test_the_summary_is_read_as_it_was_written(everything: tuple[Path, PairControls]) -> None:
    """The same object; none for another pair; a damaged file is named; finished controls are not trained again."""
    path, found = everything
    assert read_controls(path, a=BASE, b=CHAT) == found
    assert found.fingerprint == open_run(path).fingerprint
    assert read_controls(path, a=CHAT, b=BASE) is None and read_controls(path / "nowhere", a=BASE, b=CHAT) is None
    assert found.score("joint", "b") is not None and found.score("none", "b") is None
    assert found.table().num_rows == 6 and len(found.named("repeat")) == 3
    before = (path / "controls" / "null-base--chat-1" / "crosscoder" / "model.safetensors").stat().st_mtime_ns
    assert run_controls(path, WantedControls(("identical",))) == found
    assert (path / "controls" / "null-base--chat-1" / "crosscoder" / "model.safetensors").stat().st_mtime_ns == before
    assert all(control.finished for control in planned(path, WantedControls(("null", "repeat"))).values())


def test_a_damaged_summary_is_named(everything: tuple[Path, PairControls], tmp_path: Path) -> None:
    content = json.loads((everything[0] / "controls" / "summary.json").read_text())
    del content["pairs"][0]["scores"][0]["cut"]["value"]
    (tmp_path / "controls").mkdir()
    (tmp_path / "controls" / "summary.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match="does not describe controls"):
        read_controls(tmp_path, a=BASE, b=CHAT)


def test_one_seed_is_not_tested_and_no_null_calibrates_nothing(config: RunConfig, tmp_path: Path) -> None:
    """Said in the notes; what was overridden too."""
    path = train(config.model_copy(update={"out": str(tmp_path / "run")})).path
    nothing = run_controls(path, WantedControls(("identical",), overrides=("train.num_tokens=1024",)))
    assert not nothing.calibrated and nothing.scores == () and nothing.band is None
    assert any("no null control" in note for note in nothing.notes)
    one = run_controls(path, WantedControls(("null",), seeds=1, overrides=("train.num_tokens=1024",)))
    assert (one.calibration_seeds, one.test_seeds) == ((1,), ())
    assert all(score.test is None for score in one.scores) and one.null_beyond_band is None
    assert any("none tests them" in note for note in one.notes)
    assert any("train.num_tokens=1024" in note for note in one.notes)
    assert not any(result.like_for_like for result in one.runs) and {r.num_rows for r in one.runs} == {1024}
    shorter = RunConfig.load(path / "controls" / "null-base--chat-1" / "run.yaml")
    assert shorter.train.checkpoint_every == 1 and shorter.losses.aux.dead_after_tokens == 51
    with pytest.raises(RunConflict, match="another configuration"):
        run_controls(path, WantedControls(("null",), seeds=1))


def test_what_cannot_be_is_refused_before_anything_is_trained(
    everything: tuple[Path, PairControls], config: RunConfig, tmp_path: Path
) -> None:
    """Pairs, partners, seeds, overrides, and a run that is not finished."""
    path, _ = everything
    with pytest.raises(UnknownSource):
        plan_controls(path, WantedControls(), a="base", b="other")
    with pytest.raises(SourceMismatch, match="two different ones|both"):
        plan_controls(path, WantedControls(), a="base", b="base")
    with pytest.raises(ConfigError, match="no model of this run is called 'plain'"):
        plan_controls(path, WantedControls((), partners={"plain": "x"}))
    with pytest.raises(ModelNotFound):
        plan_controls(path, WantedControls((), partners={"chat": str(tmp_path / "nowhere")}))
    with pytest.raises(ConfigError, match="no control was asked for"):
        plan_controls(path, WantedControls(()))
    with pytest.raises(ConfigError, match="at least one seed"):
        plan_controls(path, WantedControls(seeds=0))
    with pytest.raises(UnknownKey, match="train.batch_size"):
        plan_controls(path, WantedControls(overrides=("train.batch_sise=3",)))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    config.dump(unfinished / "run.yaml")
    with pytest.raises(RunConflict, match="not finished"):
        plan_controls(unfinished, WantedControls())


def test_unequal_widths_have_no_null_pair(config: RunConfig, toy_model_directory, tmp_path: Path) -> None:
    """There is no difference to make up; SAEs of each source there are."""
    from conftest import build_toy_model

    narrow = toy_model_directory(build_toy_model(seed=3, width=16), "narrow")
    models = {**config.models, "chat": config.models["chat"].model_copy(update={"path": str(narrow)})}
    path = train(config.model_copy(update={"models": models, "out": str(tmp_path / "run")})).path
    with pytest.raises(SourceMismatch, match="two sources of one width"):
        plan_controls(path, WantedControls())
    found = planned(path, WantedControls(("baselines",)))
    assert list(found) == ["sae-base", "sae-chat"]


def test_equal_compute_is_equal_weights() -> None:
    """Latents times widths, at what is read and at what is written."""
    sources = SourceSet([Source("base", "embed", 4), Source("chat", "embed", 4), Source("chat", "layers.0.mlp_out", 6)])
    pair = [source.key for source in sources][:2]
    both = sources.subset(pair)
    assert equal_latents(acausal(both, num_latents=10), pair, width=4) == 20
    assert equal_latents(acausal(sources, num_latents=10), pair, width=4) == 20
    assert equal_latents(acausal(sources, num_latents=10), [sources.keys[2]], width=6) == 10
    mixed = dedicated(both, shared=6, exclusive={"base": 3, "chat": 1})
    assert equal_latents(mixed, pair[:1], width=4) == 9 and equal_latents(mixed, pair[1:], width=4) == 7
    assert equal_latents(mixed, pair, width=4) == 16
    causal = strictly_causal(sources.subset(pair[:1]), sources.subset(pair[1:]), num_latents_per_layer=8)
    assert equal_latents(causal, pair[:1], width=4) == 4  # it reads there and writes elsewhere
