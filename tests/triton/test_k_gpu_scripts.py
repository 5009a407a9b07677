"""What runs on a GPU, run on the CPU at a tiny size: the check, the benchmark, and both where there is no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "gpu"


def run(script: str, *arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    """A script in a process without this environment's package: as on a bare machine, from the sources."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=SCRIPTS)


def test_the_check_holds_at_a_tiny_size(tmp_path: Path) -> None:
    done = run("check.py", "--interpret", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["format"] == "crosscoder.gpu_check/1"
    assert len(record["checks"]) > 30 and all(line["holds"] for line in record["checks"])
    assert "| check | holds | seen |" in (tmp_path / "check.md").read_text()


def test_the_benchmark_measures_at_a_tiny_size(tmp_path: Path) -> None:
    done = run("step.py", "--interpret", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "step.json").read_text())
    assert [r["contender"] for r in record["results"]] == ["ours", "dense bf16", "textbook sparse"]
    assert all(r["milliseconds"] > 0 and len(r["phases"]) >= 4 for r in record["results"])
    assert "| textbook sparse |" in (tmp_path / "step.md").read_text()


@pytest.mark.parametrize("script", ["check.py", "step.py"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_one_line_says_so(script: str) -> None:
    done = run(script, interpreted=False)
    assert done.returncode == 0
    assert done.stdout.startswith("No CUDA device here") and len(done.stdout.splitlines()) == 1


def test_a_dry_run_needs_the_interpreter() -> None:
    done = run("check.py", "--interpret", interpreted=False)
    assert done.returncode != 0 and "TRITON_INTERPRET=1" in done.stderr


def test_a_check_that_does_not_hold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exactness, worlds, products = (import_module(n) for n in ("gpu_exactness", "gpu_worlds", "gpu_sparse_step"))
    world = worlds.World(worlds.TINY, device="cpu")
    step, right = world.step(), products.sum_by_latent
    monkeypatch.setattr(products, "sum_by_latent", lambda *arguments: right(*arguments) * (1 + 1e-4))
    found = {one.what: one.value <= one.bound for one in exactness.against_dense(step, world.rows())}
    assert [what for what, holds in found.items() if not holds] == [
        "gradient of encoder", "gradient of encoder_bias", "gradient of decoder", "gradient norm",
    ]  # fmt: skip


def test_contenders_train() -> None:
    worlds, contenders = (import_module(name) for name in ("gpu_worlds", "gpu_contenders"))
    world = worlds.World(worlds.TINY, device="cpu")
    ours = world.step()
    for kind in (contenders.DenseStep, contenders.TextbookStep):
        encoder, decoder = (ours.weights[name].clone() for name in ("encoder", "decoder"))
        step = kind(encoder, decoder, widths=worlds.TINY.widths, k=worlds.TINY.k)
        for group in step.optimiser.param_groups:
            group["lr"] = 1e-2
        losses = [float(step(world.rows())) for _ in range(60)]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), kind
