"""Whole runs on real (toy) models: files, resuming after kills, conflicts, full disks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import crosscoder as xc
from conftest import build_toy_model
from crosscoder.errors import (
    ModelNotFound,
    NonFiniteActivations,
    RunConflict,
    TextError,
    TokenizerMismatch,
    UnsupportedSite,
)
from crosscoder.files import read_tensors
from crosscoder.training import checkpoint
from crosscoder.training.config import RunConfig
from crosscoder.training.run import train
from crosscoder.training.sinks import read_metrics

RunFile = Callable[..., Path]
COMMAND = [sys.executable, "-m", "crosscoder.cli", "train"]


def load(path: Path, *overrides: str) -> RunConfig:
    return RunConfig.load(path, overrides)


def test_a_run_leaves_what_it_says(toy_run_file: RunFile) -> None:
    result = xc.train(toy_run_file())
    names = sorted(p.name for p in result.path.iterdir())
    assert names == ["analysis", "checkpoints", "crosscoder", "metrics.jsonl", "run.yaml"]
    assert result.metrics["held_out/fve"] > 0.1
    assert not result.crosscoder.training
    again = xc.Crosscoder.load(result.path / "crosscoder")
    x = torch.randn(20, 64)
    assert torch.equal(again(x), result.crosscoder(x))
    made = again.provenance
    assert made["models"]["base"]["weights"] != made["models"]["chat"]["weights"]
    assert made["run"]["train"]["warmup_steps"] >= 1
    steps = [record["step"] for record in read_metrics(result.path / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 40


def test_a_finished_run_is_given_as_it_is(toy_run_file: RunFile) -> None:
    file = toy_run_file()
    first = train(file)
    before = (first.path / "crosscoder" / "model.safetensors").stat().st_mtime_ns
    second = train(file)
    assert (first.path / "crosscoder" / "model.safetensors").stat().st_mtime_ns == before
    assert second.metrics["held_out/fve"] == first.metrics["held_out/fve"]


def test_another_configuration_stops_and_lists_the_keys(toy_run_file: RunFile) -> None:
    file = toy_run_file()
    train(file)
    with pytest.raises(RunConflict) as caught:
        train(load(file, "nonlinearity.k=4", "train.learning_rate=1e-4"))
    assert "nonlinearity.k: 4 / 8" in str(caught.value)
    assert "train.learning_rate: 0.0001 / 0.003" in str(caught.value)


def test_a_run_that_never_began_makes_way_for_another_configuration(toy_run_file: RunFile) -> None:
    file = toy_run_file()
    with pytest.raises(TextError, match="held"):
        train(load(file, "text.held_out.fraction=1e-9"))
    assert train(file).metrics["rows"] == 2560


def test_what_was_dropped_from_the_configuration_is_noticed(toy_run_file: RunFile) -> None:
    run = load(toy_run_file())
    for key, override in (
        ("models.base.revision", "models.base.revision=v1"),
        ("models.base.dtype", "models.base.dtype=float32"),
        ("sources.2", "sources.2=base/embed"),
        ("train.learning_rate", "train.learning_rate=1"),
    ):
        assert key in [d.key for d in run.differences(load(toy_run_file(), override))]
    resolved = run.resolved(widths=[32, 32])
    assert run.differences(resolved) == []


def test_a_single_source_of_several_can_be_read(toy_run_file: RunFile) -> None:
    run = load(toy_run_file(), "wiring.kind=sae", "wiring.source=chat")
    result = train(run)
    assert result.crosscoder.reads.keys == ("chat/layers.0.resid_post",)
    assert result.metrics["held_out/fve"] > 0.1


def test_activations_that_are_not_numbers_stop_the_run_and_can_be_mended(
    toy_run_file: RunFile, toy_model_directory: Callable[..., Path], toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    broken = build_toy_model(seed=3)
    token = toy_tokenizer.encode(" the", add_special_tokens=False)[0]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = float("nan")
    path = toy_model_directory(broken, "broken")
    with pytest.raises(NonFiniteActivations, match=r"chat/layers\.0\.resid_post gave NaN"):
        train(load(toy_run_file(), f"models.chat.path={path}"))
    assert train(toy_run_file()).metrics["rows"] == 2560


def test_a_directory_that_is_not_a_run_is_left_alone(toy_run_file: RunFile, tmp_path: Path) -> None:
    file = toy_run_file()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunConflict, match=r"thesis\.tex"):
        train(file)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def interrupt_at(file: Path, step: int, number: signal.Signals) -> subprocess.Popen[bytes]:
    """Start the command and send a signal once the run has recorded `step`."""
    process = subprocess.Popen([*COMMAND, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = file.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.005)
    process.send_signal(number)
    process.wait(timeout=120)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resuming_after_a_kill_equals_the_uninterrupted_run_bit_for_bit(
    seed: int, toy_run_file: RunFile, tmp_path: Path
) -> None:
    file = toy_run_file(num_tokens=64 * 400)
    whole = train(load(file, f"seed={seed}", f"out={tmp_path / 'whole'}"))
    file.write_text(file.read_text() + f"seed: {seed}\n")
    step = random.Random(seed).randint(20, 200)
    killed = interrupt_at(file, step, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "crosscoder").exists()
    assert checkpoint.found(tmp_path / "run" / "checkpoints")
    resumed = train(file)
    expected = read_tensors(whole.path / "crosscoder" / "model.safetensors", thing="crosscoder")
    found = read_tensors(resumed.path / "crosscoder" / "model.safetensors", thing="crosscoder")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    records = [read_metrics(r.path / "metrics.jsonl") for r in (whole, resumed)]
    losses = [[(m["step"], m["loss"]) for m in r if "loss" in m] for r in records]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(toy_run_file: RunFile, tmp_path: Path) -> None:
    file = toy_run_file(num_tokens=64 * 400)
    stopped = interrupt_at(file, 30, signal.SIGINT)
    assert stopped.returncode == 130
    step = checkpoint.found(tmp_path / "run" / "checkpoints")[-1].step
    assert step >= 30
    assert train(file).metrics["rows"] == 64 * 400
    recorded = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert recorded == sorted(set(recorded))


def test_a_kill_during_a_checkpoint_write_leaves_the_one_before(toy_run_file: RunFile, tmp_path: Path) -> None:
    file = toy_run_file()
    whole = train(load(file, f"out={tmp_path / 'whole'}"))
    train(file)
    folder = tmp_path / "run" / "checkpoints"
    newest = checkpoint.found(folder)[-1]
    (newest.path / "complete").unlink()  # as it stands when the process dies before the last write
    draft = folder / ".step-40.new.tmp"
    draft.mkdir()
    (draft / "shard-0-of-1.safetensors").write_bytes(b"half")
    for part in (tmp_path / "run" / "crosscoder").iterdir():
        part.unlink()
    resumed = train(file)
    x = torch.randn(9, 64)
    assert torch.equal(resumed.crosscoder(x), whole.crosscoder(x))
    assert not draft.exists()


FULL = """
import resource, sys
from crosscoder.errors import DiskFull
from crosscoder.training.run import train
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
try:
    train(sys.argv[1])
except DiskFull as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(toy_run_file: RunFile, tmp_path: Path) -> None:
    file = toy_run_file(num_latents=2000)
    full = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=False)
    assert full.returncode == 7, full.stderr
    assert "no room to write" in full.stdout and "Free some space" in full.stdout
    left = [p for p in (tmp_path / "run").rglob("*") if ".tmp" in p.name or p.parent.name.startswith("step-")]
    assert left == []
    assert train(file).metrics["rows"] == 2560


def test_text_that_changed_under_a_run_is_noticed(toy_run_file: RunFile, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"document {i} says something of its own, {i * i} times over"}) for i in range(80)]
    text.write_text("\n".join(lines))
    run = load(toy_run_file(), f"text.mix.0.dataset={text}")
    train(run)
    for part in (tmp_path / "run" / "crosscoder").iterdir():
        part.unlink()
    text.write_text("\n".join(line.replace("something", "nothing") for line in lines))
    with pytest.raises(RunConflict, match="text behind"):
        train(run)


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("models.base.path=./nowhere", ModelNotFound, "nowhere"),
        ("sources.0=base/layers.7.resid_post", UnsupportedSite, r"layers\.7"),
        ("text.mix.0.dataset=./missing.jsonl", TextError, r"missing\.jsonl"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    override: str, error: type[Exception], says: str, toy_run_file: RunFile, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        train(load(toy_run_file(), override))
    assert not (tmp_path / "run").exists()


def test_an_empty_data_set_is_refused(toy_run_file: RunFile, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TextError, match="empty"):
        train(load(toy_run_file(), f"text.mix.0.dataset={tmp_path / 'empty.jsonl'}"))
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_share_their_tokens_are_refused(
    toy_run_file: RunFile, toy_chat_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for part in toy_chat_path.iterdir():
        os.link(part, other / part.name)
    text = (toy_chat_path / "tokenizer.json").read_text(encoding="utf-8")
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerMismatch):
        train(load(toy_run_file(), f"models.chat.path={other}"))
    assert not (tmp_path / "run").exists()
