"""The command line: instant help, one-screen errors, JSON where a program reads it, Ctrl-C that can be continued."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from crosscoder import __version__
from crosscoder.capture import loading
from crosscoder.cli import doctor
from crosscoder.cli.app import app
from crosscoder.cli.reporting import one_screen, print_json, print_pairs, print_table

VERBS = ("demo", "train", "evaluate", "diff", "controls", "encode", "steer", "convert", "recipes", "doctor")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_help_lists_the_verbs_that_exist() -> None:
    listed = invoke("--help").stdout.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "] == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert f"crosscoder {verb}" in result.stdout or f"root {verb}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_instant(verb: str) -> None:
    command = [sys.executable, "-c", "from crosscoder.cli.app import main; main()", *verb.split(), "--help"]
    assert any(seconds_of(command) < 0.3 for _ in range(5))


def seconds_of(command: list[str]) -> float:
    """Processor time of a command: the wall clock of a busy machine says nothing about the command."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_version() -> None:
    assert invoke("--version").stdout == f"crosscoder {__version__}\n"


def test_users_mistakes_are_one_screen_without_traceback(run_path: Path) -> None:
    result = invoke("train", run_path, "train.batch_sise=3")
    assert result.exit_code == 2
    assert result.stdout == ""
    first, *others = result.stderr.splitlines()
    assert first == f"UnknownKey: {run_path} has 1 problem."
    assert others[0] == "  train.batch_sise: there is no such key; did you mean train.batch_size?"
    assert "Traceback" not in result.stderr


def test_our_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_screen("never said"):
        _ = 1 / 0


def test_interrupts_say_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit) as caught, one_screen("The same command goes on."):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "\nStopped. The same command goes on.\n"


def test_train_without_a_file_says_what_is_missing() -> None:
    result = invoke("train")
    assert result.exit_code == 2
    assert "expected a run file" in result.stderr


def test_keys_are_listed_with_defaults_and_meaning() -> None:
    listed = invoke("train", "--keys").stdout
    assert "train.decay_fraction [0.2]\n    Last part of the run" in listed
    as_json = json.loads(invoke("train", "--keys", "--json").stdout)
    assert {"path": "seed", "default": "0"}.items() <= as_json[1].items()


def test_train_prints_metrics_as_json_and_nothing_else(run_path: Path, tmp_path: Path) -> None:
    result = invoke("train", run_path, "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["run"] == str(tmp_path / "run")
    assert 0 < printed["metrics"]["held_out/l0"] <= 64
    assert (tmp_path / "run" / "crosscoder" / "model.safetensors").exists()
    again = invoke("train", run_path, "--json")
    assert json.loads(again.stdout) == printed
    assert f"{tmp_path / 'run'} is finished" in again.stderr


def test_a_changed_configuration_is_refused_by_key(run_path: Path) -> None:
    assert invoke("train", run_path).exit_code == 0
    result = invoke("train", run_path, "nonlinearity.k=4")
    assert result.exit_code == 2
    assert result.stderr.startswith("RunConflict: ")
    assert "nonlinearity.k: 4 / 8" in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.base.path={tmp}/nowhere", "ModelNotFound: "),
        ("sources.0=base/layers.7.resid_post", "UnsupportedSite: "),
        ("text.mix.0.dataset={tmp}/nowhere.jsonl", "TextError: "),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(
    run_path: Path, tmp_path: Path, override: str, message: str
) -> None:
    result = invoke("train", run_path, override.format(tmp=tmp_path))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(run_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from crosscoder.cli.app import main; main()", "train", str(run_path)]
    command += ["train.num_tokens=1280000", "train.checkpoint_every=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "The same command goes on from the last checkpoint." in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/complete"))


def test_doctor_names_what_is_missing_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    findings = {finding.name: finding for finding in doctor.examine(network=False)}
    assert findings["wandb"].fix == "pip install 'crosscoder[wandb]'"
    assert findings["python"].state == "ok"
    assert findings["model hub"].state == "note"


def test_doctor_reports_absent_packages_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = {finding.name: finding for finding in doctor.examine(network=True)}
    for name in ("torch", "transformers", "datasets"):
        assert (findings[name].state, findings[name].fix) == ("missing", f"pip install {name}")
    assert findings["cpu"].state == "note"


def test_doctor_and_capture_agree_on_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, answer in ((torch.bfloat16, "yes"), (torch.float32, "no")):
        monkeypatch.setattr(loading, "default_cpu_dtype", lambda dtype=dtype: dtype)
        findings = {finding.name: finding for finding in doctor.examine(network=False)}
        assert findings["cpu"].text.endswith(f"bfloat16 in hardware: {answer}")


def test_printed_json_has_null_for_what_is_not_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"fve": float("nan"), "rows": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"fve": None, "rows": [None, 1.5]}


def test_doctor_prints_json() -> None:
    findings = json.loads(invoke("doctor", "--json").stdout)
    assert {"python", "torch", "cpu", "memory", "disk", "demo models"} <= {finding["name"] for finding in findings}


def test_doctor_fails_when_the_demo_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MODELS", ("absent",))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "not in this installation: absent" in result.stdout


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("source", "FVE"), [("base/embed", "0.9"), ("b", "0.95")])
    print_pairs({"rows": 12345, "loss": 0.123456, "rate": 23456.7})
    assert capsys.readouterr().out.splitlines() == [
        "source       FVE",
        "base/embed   0.9",
        "b           0.95",
        "rows  12,345",
        "loss  0.1235",
        "rate  23,457",
    ]


@pytest.mark.slow
def test_evaluate_and_diff_write_their_files_and_print_them(run_path: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert invoke("train", run_path).exit_code == 0
    evaluated = invoke("evaluate", directory)
    assert "held-out rows" in evaluated.stdout
    assert "base/layers.1.resid_post" in evaluated.stdout
    printed = json.loads(invoke("evaluate", directory, "--json").stdout)
    assert printed["fve"] == json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))["fve"]
    found = invoke("diff", directory, "--a", "base", "--b", "chat")
    assert f"Open the report: {directory / 'diff' / 'base--chat' / 'report.html'}" in found.stdout
    assert (directory / "diff" / "base--chat" / "report.html").is_file()
    summary = json.loads(invoke("diff", directory, "--json").stdout)
    assert sum(summary["classes"].values()) == 64


@pytest.mark.parametrize("verb", ["evaluate", "diff"])
def test_a_path_without_a_run_is_an_error_on_one_screen(verb: str, tmp_path: Path) -> None:
    result = invoke(verb, tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("FileFormatError: ")


def test_dry_run_prints_the_plan_and_makes_nothing(run_path: Path, tmp_path: Path) -> None:
    assert "memory at its peak" in invoke("train", run_path, "--dry-run").stdout
    planned = json.loads(invoke("train", run_path, "--dry-run", "--json").stdout)
    assert planned["num_steps"] == 50
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_controls_are_planned_trained_and_told(run_path: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert invoke("train", run_path).exit_code == 0
    planned = json.loads(invoke("controls", directory, "--dry-run", "--json").stdout)
    assert [control["name"] for control in planned["controls"]] == [f"null-base--chat-{seed}" for seed in (1, 2, 3)]
    assert planned["num_rows_to_train"] == 3 * 3200
    assert "3,200 rows to train." in invoke("controls", directory, "--identical", "--dry-run").stdout
    assert not (directory / "controls").exists()
    found = invoke("controls", directory, "--null", "--seeds", 2, "--num-tokens", 1280)
    assert found.exit_code == 0
    assert "Cut-offs from null seeds 1, tested on 2:" in found.stdout
    assert "train.num_tokens=1280" in found.stdout
    written = json.loads((directory / "controls" / "summary.json").read_text(encoding="utf-8"))
    assert written["format"] == "crosscoder.controls/1"
    again = json.loads(invoke("controls", directory, "--null", "--seeds", 2, "--num-tokens", 1280, "--json").stdout)
    assert again == written["pairs"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partner", "chat"], "expected --partner ALIAS=PATH"),
        (["--partner", "chat=x", "--partner", "chat=y"], "one alias is given two partners"),
    ],
)
def test_partners_are_pairs_of_alias_and_path(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("controls", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
