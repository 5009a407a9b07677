"""A run file on the toy models that trains in about a second."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def run_path(tmp_path: Path, toy_base_path: Path, toy_chat_path: Path, toy_text_path: Path) -> Path:
    return write_run(tmp_path, base=toy_base_path, chat=toy_chat_path, text=toy_text_path)


def write_run(directory: Path, *, base: Path, chat: Path, text: Path) -> Path:
    """The run file; the run itself goes to `run` beside it."""
    run = {
        "format": "crosscoder.run/1",
        "models": {"base": {"path": str(base)}, "chat": {"path": str(chat)}},
        "sources": ["base/layers.1.resid_post", "chat/layers.1.resid_post"],
        "text": {
            "tokenizer": "base",
            "context_length": 32,
            "mix": [{"dataset": str(text)}],
            "held_out": {"fraction": 0.2, "num_tokens": 400},
        },
        "activations": {"buffer_gb": 0.002},
        "normaliser": {"num_tokens": 500},
        "wiring": {"kind": "acausal", "num_latents": 64},
        "nonlinearity": {"k": 8},
        "train": {"num_tokens": 3200, "batch_size": 64, "learning_rate": 1e-3},
        "out": str(directory / "run"),
    }
    path = directory / "pair.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path
