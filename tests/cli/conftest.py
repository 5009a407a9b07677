"""A run file on the toy models that trains in about a second."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def run_path(tmp_path: Path, toy_base_path: Path, toy_chat_path: Path, toy_text_path: Path) -> Path:
    run = {
        "format": "crosscoder.run/1",
        "models": {"base": {"path": str(toy_base_path)}, "chat": {"path": str(toy_chat_path)}},
        "sources": ["base/layers.1.resid_post", "chat/layers.1.resid_post"],
        "text": {
            "tokenizer": "base",
            "context_length": 32,
            "mix": [{"dataset": str(toy_text_path)}],
            "held_out": {"fraction": 0.2, "num_tokens": 400},
        },
        "activations": {"buffer_gb": 0.002},
        "normaliser": {"num_tokens": 500},
        "wiring": {"kind": "acausal", "num_latents": 64},
        "nonlinearity": {"k": 8},
        "train": {"num_tokens": 3200, "batch_size": 64, "learning_rate": 1e-3},
        "out": str(tmp_path / "run"),
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path
