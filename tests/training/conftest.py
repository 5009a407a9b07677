"""A run file over the toy pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def toy_run_file(tmp_path: Path, toy_base_path: Path, toy_chat_path: Path, toy_text_path: Path) -> Callable[..., Path]:
    """`toy_run_file(num_latents=..., ...)` writes a run over the toy pair; its directory is `run` beside it."""

    def write(
        *, num_latents: int = 64, num_tokens: int = 2560, batch_size: int = 64, buffer_gb: float = 0.0002, k: int = 8
    ) -> Path:
        run = {
            "format": "crosscoder.run/1",
            "models": {"base": {"path": str(toy_base_path)}, "chat": {"path": str(toy_chat_path)}},
            "sources": ["base/layers.0.resid_post", "chat/layers.0.resid_post"],
            "text": {
                "tokenizer": "base",
                "context_length": 32,
                "mix": [{"dataset": str(toy_text_path)}],
                "held_out": {"fraction": 0.2, "num_tokens": 400},
            },
            "activations": {"buffer_gb": buffer_gb, "passes": 2},
            "normaliser": {"num_tokens": 500},
            "wiring": {"kind": "acausal", "num_latents": num_latents},
            "nonlinearity": {"k": k},
            "losses": {"aux": {"dead_after_tokens": 512}},
            "train": {"num_tokens": num_tokens, "batch_size": batch_size, "learning_rate": 3e-3, "checkpoint_every": 3},
            "out": str(tmp_path / "run"),
        }
        path = tmp_path / "pair.yaml"
        path.write_text(yaml.safe_dump(run), encoding="utf-8")
        return path

    return write
