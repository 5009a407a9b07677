"""Published weights of other tools, over real HTTP from a hub on loopback, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import hub
from interop import foreign

PULL = """
import sys
import crosscoder as xc
for source in sys.argv[1:]:
    done = xc.interop.convert(source, sites="layers.13.resid_post", revision="main")
    print(done.layout, done.crosscoder.scale.tolist(), done.crosscoder.provenance["converted"]["commit"])
"""


@pytest.mark.slow
def test_published_weights_are_fetched_and_nothing_else(tmp_path: Path) -> None:
    kissane, folder = "ckkissane/crosscoder-gemma-2-2b-model-diff", "blocks.14.hook_resid_pre"
    foreign.kissane_files(tmp_path / "a" / folder, foreign.kissane(), foreign.kissane_settings(), hub=True)
    foreign.pretrained_directory(tmp_path / "b", foreign.learned(normaliser="per_source"))
    (tmp_path / "b" / "optimizer.bin").write_bytes(b"not wanted")
    with hub.serving() as server:
        server.repositories[kissane] = contents(tmp_path / "a")
        server.repositories["someone/pair"] = contents(tmp_path / "b")
        names = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **names, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PULL, kissane, f"{kissane}/{folder}", "someone/pair"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, third = done.stdout.splitlines()
    assert first == second
    assert first.startswith("ckkissane [0.27589")
    assert third.startswith("dictionary_learning")
    assert all(line.endswith(hub.COMMIT) for line in (first, second, third))
    assert not list((tmp_path / "home").rglob("optimizer.bin"))
    assert json.loads(next((tmp_path / "home").rglob("cfg.json")).read_text(encoding="utf-8"))["device"] == "cuda:7"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
