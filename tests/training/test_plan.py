"""The plan of a run against the run: parameters exactly, peak memory within a fifth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import UnsupportedSite
from crosscoder.nonlinearities import TopK
from crosscoder.training.config import RunConfig
from crosscoder.training.plan import num_parameters, plan
from crosscoder.wiring import LatentGroup, Wiring
from training.worlds import SOURCES

MEASURE = """
import json, sys
from crosscoder.training.config import RunConfig
from crosscoder.training.run import train
train(RunConfig.load(sys.argv[1]))
status = open("/proc/self/status").read()
print(json.dumps(1024 * int(status.split("VmHWM:")[1].split()[0])))
"""


def test_parameters_are_counted_exactly() -> None:
    groups = [LatentGroup("a", 7, SOURCES.keys, SOURCES.keys), LatentGroup("b", 3, SOURCES.keys[:1], SOURCES.keys[1:])]
    wiring = Wiring(SOURCES, groups)
    assert num_parameters(wiring, TopK(1)) == sum(p.numel() for p in Crosscoder(wiring, TopK(1)).parameters())


def test_a_site_that_the_model_lacks_is_refused_before_any_weights_are_read(
    toy_run_file: Callable[..., Path],
) -> None:
    run = RunConfig.load(toy_run_file(), ["sources.0=base/layers.9.resid_post"])
    with pytest.raises(UnsupportedSite, match="layers.9"):
        plan(run)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_predicted_within_a_fifth(toy_run_file: Callable[..., Path]) -> None:
    file = toy_run_file(num_latents=30_000, num_tokens=40_000, batch_size=4096, buffer_gb=0.4, k=32)
    planned = subprocess.run(
        [sys.executable, "-m", "crosscoder.cli", "train", str(file), "--dry-run", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    predicted = json.loads(planned.stdout)["memory_total"]
    measured = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, check=True)
    peak = int(measured.stdout.strip().splitlines()[-1])
    assert abs(predicted - peak) / peak < 0.2, f"predicted {predicted / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB"
