"""Pushing to and loading from a hub, over real HTTP, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import hub

PUSH_AND_PULL = """
import sys, torch
import crosscoder as xc
sources = xc.SourceSet([xc.Source("base", "embed", 6), xc.Source("chat", "embed", 4)])
cc = xc.Crosscoder(xc.wiring.acausal(sources, num_latents=12), xc.TopK(3), seed=5).eval()
cc.provenance = {"models": {"base": {"path": "owner/base"}}}
print(cc.push_to_hub("someone/pair"))
again = xc.Crosscoder.load("someone/pair")
x = torch.randn(8, 10)
assert torch.equal(again(x), cc(x)) and again.provenance == cc.provenance
try:
    xc.Crosscoder.load("someone/missing")
except xc.errors.FileFormatError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_is_pushed_can_be_loaded_by_its_name(tmp_path: Path) -> None:
    with hub.serving() as server:
        names = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **names, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_PULL], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"{server.address}/someone/pair/commit/" in done.stdout
        assert "neither a directory here nor to be had from the Hub" in done.stdout
        assert sorted(server.repositories["someone/pair"]) == ["README.md", "config.json", "model.safetensors"]
