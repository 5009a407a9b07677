"""What runs on a GPU, run on the CPU at a tiny size: the check and the benchmark of the trainer, also where there is no
device, or not what the trainer needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from crosscoder.kernels.triton import encodings, operations
from crosscoder.training.dead import DeadLatents
from crosscoder.training.losses import Auxiliary

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "gpu"


def run(
    script: str, *arguments: str, interpreted: bool = True, first: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A script in a process without this environment's package: as on a bare machine, from the sources.

    Modules in the folder `first` hide others of their name.
    """
    path = os.pathsep.join(map(str, [*([first] if first else []), ROOT / "src"]))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=SCRIPTS)


def bare(folder: Path) -> Path:
    """A folder that hides pydantic and xxhash."""
    folder.mkdir()
    for name in ("pydantic", "xxhash"):
        (folder / f"{name}.py").write_text("raise ImportError(__name__)\n")
    return folder


def test_the_check_holds_at_a_tiny_size(tmp_path: Path) -> None:
    done = run("check.py", "--interpret", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "check.json").read_text())
    assert (record["format"], record["left_out"]) == ("crosscoder.gpu_check/2", None)
    assert len(record["checks"]) > 60 and all(line["holds"] for line in record["checks"])
    named = " ".join(line["what"] for line in record["checks"])
    for part in ("gradient of encoder, 4 dead latents", "a tenth dead are bit-equal", "without a synchronisation"):
        assert part in named
    assert "| check | holds | seen |" in (tmp_path / "check.md").read_text()


def test_the_benchmark_measures_at_a_tiny_size(tmp_path: Path) -> None:
    done = run("step.py", "--interpret", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [r["contender"] for r in results] == ["ours", "ours, a tenth dead", "dense bf16", "textbook sparse"]
    assert [r["dead"] for r in results] == [0, 4, 0, 0]
    assert all(r["milliseconds"] > 0 and len(r["phases"]) >= 4 for r in results)
    for part in ("crosscoder.activity", "crosscoder.fit", "backward", "optimiser.update", "settle"):
        assert part in results[0]["phases"]
    assert "| textbook sparse |" in (tmp_path / "step.md").read_text()


def test_without_what_the_trainer_needs_the_kernels_are_checked(tmp_path: Path) -> None:
    done = run("check.py", "--interpret", "--out", str(tmp_path), first=bare(tmp_path / "bare"))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "pip install pydantic xxhash" in line]
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["left_out"] == line and line in (tmp_path / "check.md").read_text()
    assert any("edge case" in check["what"] for check in record["checks"])
    assert any("an update" in check["what"] for check in record["checks"])
    assert not any("steps" in check["what"] for check in record["checks"])


def test_without_what_the_trainer_needs_the_benchmark_gives_the_floor(tmp_path: Path) -> None:
    done = run("step.py", "--interpret", "--out", str(tmp_path), first=bare(tmp_path / "bare"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["left_out"] in done.stdout and record["results"] == [] and record["floors"]


@pytest.mark.parametrize("script", ["check.py", "step.py"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_one_line_says_so(script: str) -> None:
    done = run(script, interpreted=False)
    assert done.returncode == 0
    assert done.stdout.startswith("No CUDA device here") and len(done.stdout.splitlines()) == 1


def test_a_dry_run_needs_the_interpreter() -> None:
    done = run("check.py", "--interpret", interpreted=False)
    assert done.returncode != 0 and "TRITON_INTERPRET=1" in done.stderr


@pytest.fixture
def found_wrong() -> Iterator[Callable[[], list[str]]]:
    """What a trainer with dead latents does not compute as fp64 does, with whatever a test has broken meanwhile."""
    exactness, trainers, worlds = (import_module(name) for name in ("gpu_exactness", "gpu_trainer", "gpu_worlds"))
    world = worlds.World(worlds.TINY, device="cpu")
    with trainers.on_triton("cpu"):
        trainer = trainers.trained(world, steps=2, dead=True, losses=trainers.AUX)
        yield lambda: [c.what for c in exactness.against_dense(trainer, world.rows()) if not c.value <= c.bound]


def test_a_right_step_is_found_right(found_wrong: Callable[[], list[str]]) -> None:
    assert found_wrong() == []


def test_gradients_a_little_off_are_seen(found_wrong: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    right = operations.sum_by_latent
    monkeypatch.setattr(operations, "sum_by_latent", lambda *a, **k: right(*a, **k).mul_(1 + 1e-4))
    assert found_wrong() == ["gradient of encoder", "gradient of decoder", "gradient norm"]


def test_dead_latents_left_alone_are_seen(
    found_wrong: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Auxiliary, "add_gradients", lambda self: None)
    wrong = found_wrong()
    assert {f"gradient of {name}, 4 dead latents" for name in ("encoder", "encoder_bias", "decoder")} <= set(wrong)
    assert "loss" not in wrong and "gradient of bias" not in wrong


def test_living_latents_among_the_dead_are_seen(
    found_wrong: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone = (torch.arange(40), torch.ones(40, dtype=torch.bool))
    monkeypatch.setattr(DeadLatents, "without_waiting", lambda *a, **k: everyone)
    assert "gradient of encoder" in found_wrong()


def test_pairs_that_were_not_kept_are_seen(
    found_wrong: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = encodings.batch_top_k
    monkeypatch.setattr(encodings, "batch_top_k", lambda e, k, cut: right(e, k - 1, cut))
    assert found_wrong() == ["pairs missing"]


def test_contenders_train() -> None:
    trainers, worlds, contenders = (import_module(n) for n in ("gpu_trainer", "gpu_worlds", "gpu_contenders"))
    world = worlds.World(worlds.TINY, device="cpu")
    start = trainers.Weights.fresh(world)
    for kind in (contenders.DenseStep, contenders.TextbookStep):
        step = kind(start.encoder.clone(), start.decoder.clone(), widths=worlds.TINY.widths, k=worlds.TINY.k)
        for group in step.optimiser.param_groups:
            group["lr"] = 1e-2
        losses = [float(step(world.rows())) for _ in range(60)]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), kind
