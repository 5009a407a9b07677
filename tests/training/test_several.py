"""Several dictionaries from one stream: what a file with `dictionaries` means, and that each is as if trained alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import crosscoder as xc
from crosscoder.analysis import evaluate_run
from crosscoder.cli.app import app
from crosscoder.errors import ConfigError, RunConflict, TrainingDiverged, UnknownKey
from crosscoder.files import read_tensors
from crosscoder.training import checkpoint, several
from crosscoder.training.config import AcausalConfig, BatchTopKConfig, JumpReLUConfig, RunConfig, TanhSparsity
from crosscoder.training.plan import plan
from crosscoder.training.run import train, train_together
from crosscoder.training.sinks import RunStart, Sink, read_metrics

RunFile = Callable[..., Path]
PAIR: dict[str, Any] = {
    "small": {"wiring": {"num_latents": 32}, "nonlinearity": {"k": 4}, "losses": {"source_dropout": 0.2}},
    "large": {"train": {"learning_rate": 1e-3}, "losses": {"source_dropout": 0.3}},
}


@pytest.fixture
def file_of(toy_run_file: RunFile) -> Callable[[Mapping[str, Any]], Path]:
    """`file_of(dictionaries, key=value)` writes the toy run with these dictionaries."""

    def write(dictionaries: Mapping[str, Any], **top: Any) -> Path:
        path = toy_run_file(num_tokens=1280)
        content = yaml.safe_load(path.read_text()) | {"dictionaries": dict(dictionaries)} | top
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same weights, calibrations and metrics, to the bit; clocks differ."""
    expected, found = (
        read_tensors(run / "crosscoder" / "model.safetensors", thing="crosscoder") for run in (one, other)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    records = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    for record in (*records[0], *records[1]):
        record.pop("rows_per_second", None)
    assert records[0] == records[1]


class StopsAt:
    """A sink that fails at a step, as a run does that is killed there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def open(self, start: RunStart) -> None: ...

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            raise RuntimeError("stopped")

    def close(self) -> None: ...


# The file


def test_every_entry_is_a_run_with_its_own_keys_over_those_of_the_file(file_of: Any) -> None:
    small, large = several.load(file_of(PAIR))
    assert small.wiring == AcausalConfig(num_latents=32) and large.wiring == AcausalConfig(num_latents=64)
    assert (small.k, large.k) == (4, 8)
    assert (small.train.learning_rate, large.train.learning_rate) == (3e-3, 1e-3)
    assert (small.losses.source_dropout, large.losses.source_dropout) == (
        0.2,
        0.3,
    ) and large.losses.aux == small.losses.aux
    assert small.out is not None and (Path(small.out).parts[-2:], Path(str(large.out)).name) == (
        ("run", "small"),
        "large",
    )


def test_a_file_without_dictionaries_is_one_run(toy_run_file: RunFile) -> None:
    path = toy_run_file()
    assert several.load(path, ["seed=3"]) == (RunConfig.load(path, ["seed=3"]),)


def test_a_new_kind_drops_what_it_does_not_accept_and_lists_are_values(file_of: Any) -> None:
    parts = [{"kind": "sae", "source": "base", "num_latents": 8}, {"kind": "sae", "source": "chat", "num_latents": 8}]
    jump, both = several.load(
        file_of(
            {
                "jump": {"nonlinearity": {"kind": "jump_relu"}, "sparsity": {"kind": "tanh", "coefficient": 0.1}},
                "both": {"wiring": {"combine": parts}},
            }
        )
    )
    assert jump.nonlinearity == JumpReLUConfig() and jump.sparsity == TanhSparsity(coefficient=0.1)
    assert both.wiring.kind == "combine" and both.nonlinearity == BatchTopKConfig(k=8)


def test_the_file_itself_needs_no_wiring_when_every_entry_has_one(file_of: Any, tmp_path: Path) -> None:
    path = file_of({"a": {"wiring": {"kind": "acausal", "num_latents": 16}}, "b": {}})
    content = yaml.safe_load(path.read_text())
    del content["wiring"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"dictionaries\.b\.wiring: expected a value; the key is missing"):
        several.load(path)
    assert len(several.load(path, ["dictionaries.b.wiring={kind: acausal, num_latents: 8}"])) == 2


def test_overrides_reach_the_file_and_its_entries(file_of: Any) -> None:
    path = file_of(PAIR)
    small, large = several.load(
        path, ["nonlinearity.k=6", "dictionaries.small.nonlinearity.k=2", "dictionaries.large.nonlinearity.kind=topk"]
    )
    assert (small.k, large.k, large.nonlinearity.kind) == (2, 6, "topk")
    with pytest.raises(ConfigError, match=r"(?s)dictionaries\.smal\.wiring.*there is  dictionaries\.small"):
        several.load(path, ["dictionaries.smal.wiring.num_latents=3"])


def test_a_kind_that_an_override_gives_an_entry_drops_its_foreign_keys(file_of: Any) -> None:
    entry = {"nonlinearity": {"k": 3}, "sparsity": {"kind": "l1", "coefficient": 0.1}}
    (only,) = several.load(file_of({"only": entry}), ["dictionaries.only.nonlinearity.kind=relu"])
    assert only.nonlinearity.kind == "relu"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"nonlinearity": {"kk": 3}}, "dictionaries.a.nonlinearity.kk: there is no such key; did you mean "
         "dictionaries.a.nonlinearity.k?"),
        ({"nonlinarity": {"k": 3}}, "dictionaries.a.nonlinarity: there is no such key; did you mean "
         "dictionaries.a.nonlinearity?"),
        ({"learning_rate": 3}, "dictionaries.a.learning_rate: there is no such key; did you mean "
         "dictionaries.a.train.learning_rate?"),
        ({"train": {"learning_rat": 3}}, "dictionaries.a.train.learning_rat: there is no such key; did you mean "
         "dictionaries.a.train.learning_rate?"),
        ({"text": {"context_length": 3}}, "dictionaries.a.text: this is common to all dictionaries"),
        ({"train": {"batch_size": 3}}, "dictionaries.a.train.batch_size: this is common to all dictionaries"),
        ({"nonlinearity": {"kind": "relu"}}, "dictionaries.a: sparsity.kind: expected l1 or tanh"),
        ({"wiring": {"num_latents": -1}}, "dictionaries.a.wiring.num_latents: input should be greater"),
        ({"train": {"learning_rate": 0}}, "dictionaries.a.train.learning_rate: input should be greater than 0"),
    ],
)  # fmt: skip
def test_problems_of_an_entry_have_their_place(entry: dict[str, Any], says: str, file_of: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        several.load(file_of({"a": entry, "b": {}}))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 1 problem.") and lines[1].strip().startswith(says)
    assert isinstance(caught.value, UnknownKey) == ("no such key" in says)


def test_problems_of_the_file_are_told_once(file_of: Any) -> None:
    path = file_of({"a": {"nonlinearity": {"k": 2}}, "b": {}})
    with pytest.raises(ConfigError) as caught:
        several.load(path, ["train.learning_rat=1", "nonlinearity.kk=2", "sources.1=base/layers.0.resid_post"])
    text = str(caught.value)
    assert "\n  train.learning_rat: there is no such key; did you mean train.learning_rate?" in text
    assert "\n  nonlinearity.kk: there is no such key; did you mean nonlinearity.k?" in text
    assert "has 2 problems" in text
    with pytest.raises(ConfigError, match=r"has 1 problem\.\n  sources: every source"):
        several.load(path, ["sources.1=base/layers.0.resid_post"])
    with pytest.raises(UnknownKey, match=r"dictionarys: there is no such key; did you mean dictionaries\?"):
        several.load(path_with(path, dictionarys={}))


def path_with(path: Path, **top: Any) -> Path:
    content = yaml.safe_load(path.read_text()) | top
    content.pop("dictionaries")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("dictionaries", [{}, {"../up": {}}, {"a b": {}}, {"a": 3}, {"": {}}])
def test_names_are_directories_and_entries_hold_keys(dictionaries: dict[str, Any], file_of: Any) -> None:
    with pytest.raises(ConfigError, match="to hold names with the keys of each"):
        several.load(file_of(dictionaries))


def test_one_run_is_not_asked_of_a_file_of_several(file_of: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected one dictionary .* holds small, large"):
        train(file_of(PAIR))


def test_runs_that_do_not_share_their_stream_are_refused(toy_run_file: RunFile, tmp_path: Path) -> None:
    one = RunConfig.load(toy_run_file())
    elsewhere = f"out={tmp_path / 'two'}"
    for override, says in (
        ("train.batch_size=32", "train.batch_size: 64 / 32"),
        ("train.log_every=7", "train.log_every: 7 / null"),
        ("seed=2", "seed: 0 / 2"),
    ):
        with pytest.raises(ConfigError, match=says):
            train_together([one, RunConfig.load(toy_run_file(), [override, elsewhere])])
    with pytest.raises(ConfigError, match="directory of its own"):
        train_together([one, one])
    assert not (tmp_path / "run").exists()


# Training


def test_each_is_to_the_bit_what_it_is_alone(file_of: Any, tmp_path: Path) -> None:
    """Also where one starts from its own rows, hides sources or stops at other latents than its neighbours."""
    start = {"init": {"firing_fraction": 0.1}, "wiring": {"num_latents": 16}}
    relu = {"nonlinearity": {"kind": "relu"}, "sparsity": {"kind": "l1", "coefficient": 0.1}}
    jump = {"nonlinearity": {"kind": "jump_relu"}, "sparsity": {"kind": "tanh", "coefficient": 0.1}}
    together = train_together(file_of({**PAIR, "relu": relu | start, "jump": jump | start}))
    assert [result.path.name for result in together] == ["small", "large", "relu", "jump"]
    for result in together:
        resolved = RunConfig.load(result.path / "run.yaml")
        alone = train(resolved.model_copy(update={"out": str(tmp_path / "alone" / result.path.name)}))
        assert_equal_runs(alone.path, result.path)
        assert alone.metrics.keys() == result.metrics.keys()
    assert [result.crosscoder.num_latents for result in together] == [32, 64, 16, 16]


def test_each_directory_is_an_ordinary_run(file_of: Any) -> None:
    small, large = train_together(file_of(PAIR))
    names = ["analysis", "checkpoints", "crosscoder", "metrics.jsonl", "run.yaml"]
    for result in (small, large):
        assert sorted(p.name for p in result.path.iterdir()) == names
    assert evaluate_run(small.path).l0 > 0
    again = train(RunConfig.load(small.path / "run.yaml"))
    assert again.path == small.path and again.metrics["held_out/fve"] == small.metrics["held_out/fve"]
    assert xc.Crosscoder.load(large.path / "crosscoder").num_latents == 64


@pytest.mark.parametrize("lost", [False, True])
def test_resuming_equals_never_having_stopped(lost: bool, file_of: Any, tmp_path: Path) -> None:
    """Also when the process died after one dictionary's checkpoint and before the other's."""
    file = file_of(PAIR)
    whole = train_together(several.load(file, [f"out={tmp_path / 'whole'}"]))
    stops: dict[str, list[Sink]] = {"small": [], "large": [StopsAt(10)]}
    with pytest.raises(RuntimeError, match="stopped"):
        train_together(file, sinks=lambda name: stops[name])
    folders = [tmp_path / "run" / name / "checkpoints" for name in PAIR]
    assert [[c.step for c in checkpoint.found(folder)] for folder in folders] == [[6, 9], [6, 9]]
    if lost:
        (folders[1] / "step-9" / "complete").unlink()
    resumed = train_together(file)
    for expected, found in zip(whole, resumed, strict=True):
        assert_equal_runs(expected.path, found.path)


def test_dictionaries_far_apart_do_not_go_on_together(file_of: Any, tmp_path: Path) -> None:
    file = file_of(PAIR)
    stops: list[Sink] = [StopsAt(10)]
    with pytest.raises(RuntimeError, match="stopped"):
        train_together(several.load(file)[:1], sinks=lambda name: stops)
    with pytest.raises(RunConflict, match=r"(?s)not at one place.*small  step 9.*large  step 0"):
        train_together(file)
    assert not (tmp_path / "run" / "large").exists()


@pytest.mark.slow
def test_a_dictionary_that_comes_later_sees_the_same_batches(file_of: Any, tmp_path: Path) -> None:
    both = train_together(several.load(file_of(PAIR), [f"out={tmp_path / 'both'}"]))
    train_together(file_of({"small": PAIR["small"]}))
    before = (tmp_path / "run" / "small" / "crosscoder" / "model.safetensors").stat().st_mtime_ns
    later = train_together(file_of(PAIR))
    assert (later[0].path / "crosscoder" / "model.safetensors").stat().st_mtime_ns == before
    for expected, found in zip(both, later, strict=True):
        assert_equal_runs(expected.path, found.path)


def test_a_changed_entry_is_refused_with_its_keys(file_of: Any) -> None:
    file = file_of(PAIR)
    train_together(file)
    with pytest.raises(RunConflict, match=r"(?s)small holds a run with another.*nonlinearity\.k: 5 / 4"):
        train_together(several.load(file, ["dictionaries.small.nonlinearity.k=5"]))


def test_a_divergence_says_whose_it_is(file_of: Any) -> None:
    wild = {"train": {"learning_rate": 1e6, "warmup_steps": 1, "gradient_clip": 1e9}}
    with pytest.raises(TrainingDiverged, match=r"^wild: the "):
        train_together(file_of({"tame": {}, "wild": wild}))


# Command line and plan


def test_the_plan_shares_the_stream_and_adds_the_weights(file_of: Any) -> None:
    runs = several.load(file_of(PAIR))
    small, large = (plan(run) for run in runs)
    together = plan(*runs)
    assert together.parameters == small.parameters + large.parameters
    assert together.dictionaries == {"small": small.parameters, "large": large.parameters}
    assert together.memory["buffer"] == small.memory["buffer"] and together.disk == small.disk + large.disk
    assert together.memory["step"] == max(small.memory["step"], large.memory["step"])
    assert any("dictionary small" in name for name in together.in_words())


def test_the_command_trains_them_all_and_says_where_they_are(file_of: Any, tmp_path: Path) -> None:
    file, command = file_of(PAIR), CliRunner()
    planned = command.invoke(app, ["train", str(file), "--dry-run", "--json"])
    assert set(json.loads(planned.stdout)["dictionaries"]) == {"small", "large"} and not (tmp_path / "run").exists()
    done = command.invoke(app, ["train", str(file), "--json", "dictionaries.small.nonlinearity.k=3"])
    assert done.exit_code == 0, done.output
    described = json.loads(done.stdout)["runs"]
    assert [Path(run["run"]).name for run in described] == ["small", "large"]
    assert RunConfig.load(tmp_path / "run" / "small" / "run.yaml").k == 3
    again = command.invoke(app, ["train", str(file), "dictionaries.small.nonlinearity.k=3"])
    assert "small\n" in again.stdout and "large\n" in again.stdout and again.exit_code == 0
    assert "dictionaries" in command.invoke(app, ["train", "--keys"]).stdout
