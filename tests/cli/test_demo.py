"""The demo's steps on the toy models: train, control, evaluate, diff with labels."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosscoder.capture.text import Document
from crosscoder.cli.app import app
from crosscoder.demo import run as demo
from crosscoder.training.config import RunConfig, SaeConfig


@pytest.fixture
def labels_path(tmp_path: Path, toy_text_path: Path) -> Path:
    texts = [json.loads(line)["text"] for line in toy_text_path.read_text(encoding="utf-8").splitlines()]
    hashes = [Document.of(text, dataset="toy").hash for text in texts]
    spans = [
        {"context": context, "span": [0, 40], "label": "parity.opening", "value": number % 2 == 0}
        for number, context in enumerate(hashes)
    ]
    path = tmp_path / "labels.jsonl"
    lines = [{"format": "crosscoder.labels/1"}, *spans]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_control_is_the_same_run_on_base_alone(run_path: Path) -> None:
    run = RunConfig.load(run_path)
    control = demo.baseline_config(run, Path("somewhere"))
    assert control.sources == ("base/layers.1.resid_post",)
    assert control.wiring == SaeConfig(num_latents=64)
    assert control.out == str(Path("somewhere", "controls", "sae-base"))
    assert (control.train, control.text, control.nonlinearity) == (run.train, run.text, run.nonlinearity)


@pytest.mark.slow
def test_demo_trains_evaluates_diffs_and_says_where_the_report_lies(
    run_path: Path, labels_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig.load(run_path, ["text.held_out.fraction=0.4", "text.held_out.num_tokens=2000"])
    monkeypatch.setattr(demo, "run_config", lambda out: run)
    monkeypatch.setattr(demo, "labels_path", lambda: labels_path)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "run")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "parity.opening" in result.stdout
    assert "training the crosscoder" in result.stderr
    assert "training an SAE of base" in result.stderr
    report = tmp_path / "run" / "diff" / "base--chat" / "report.html"
    assert result.stdout.endswith(f"Open the report: {report}\n")
    assert report.is_file()
    assert (tmp_path / "run" / "controls" / "sae-base" / "crosscoder" / "config.json").is_file()
