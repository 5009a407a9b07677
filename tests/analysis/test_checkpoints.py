"""Checkpoints of a model in training as sources of one run, and three models at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import build_toy_model, toy_texts
from crosscoder.analysis import diff_run, emergence, evaluate_run, one_against_all
from crosscoder.analysis.opened_run import open_run
from crosscoder.capture import loading
from crosscoder.capture.loading import ModelConfig
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ModelNotFound
from crosscoder.training.config import RunConfig
from crosscoder.training.run import train
from crosscoder.training.runfile import validate

SITE = "layers.0.resid_post"
STEPS = (0, 4, 12)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A toy model that is trained for twelve steps, saved at three of them."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = build_toy_model(seed=3)
    batch = toy_tokenizer(toy_texts(8), padding=True, return_tensors="pt")["input_ids"][:, :40]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: dict[str, Path] = {}
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            found[f"step{step}"] = root / f"step{step}"
            model.save_pretrained(found[f"step{step}"])
            toy_tokenizer.save_pretrained(found[f"step{step}"])
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    return found


@pytest.fixture(scope="module")
def run(checkpoints: dict[str, Path], toy_text_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over all three."""
    raw: dict[str, Any] = {
        "models": {name: {"path": str(path), "dtype": "float32"} for name, path in checkpoints.items()},
        "sources": [f"{name}/{SITE}" for name in checkpoints],
        "text": {
            "tokenizer": "step12",
            "context_length": 32,
            "mix": [{"dataset": str(toy_text_path)}],
            "held_out": {"fraction": 0.3, "num_tokens": 600},
        },
        "activations": {"buffer_gb": 0.001},
        "normaliser": {"num_tokens": 512},
        "wiring": {"kind": "acausal", "num_latents": 32},
        "nonlinearity": {"kind": "batch_topk", "k": 4},
        "train": {"num_tokens": 2560, "batch_size": 128, "learning_rate": 1e-3},
        "out": str(tmp_path_factory.mktemp("runs") / "checkpoints"),
    }
    return train(validate(RunConfig, raw, name="checkpoints")).path


def test_latents_over_real_checkpoints(run: Path) -> None:
    """Three models in one run; every latent has a curve over them."""
    evaluation = evaluate_run(run, num_ce_tokens=200, num_exemplars=2)
    assert list(evaluation.fve_per_source) == [f"step{step}/{SITE}" for step in STEPS]
    cc = Crosscoder.load(run / "crosscoder")
    found = emergence(cc, density=evaluation.density.float())
    assert found.sources == tuple(f"step{step}/{SITE}" for step in STEPS) and sum(found.counts.values()) == 32
    assert found.counts["dead"] == int((evaluation.density == 0).sum())
    assert sum(found.num_emerged) == 32 - found.counts["dead"]
    rows, last = cc.decoder_rows(f"step4/{SITE}"), cc.decoder_rows(f"step12/{SITE}")
    torch.testing.assert_close(found.turn[:, 1], (rows * last).sum(1) / (rows.norm(dim=1) * last.norm(dim=1)))
    torch.testing.assert_close(one_against_all(cc).share.sum(1), torch.ones(32))


@pytest.mark.parametrize("pair", [("step0", "step4"), ("step12", "step0")])
def test_any_two_of_three_can_be_diffed(run: Path, pair: tuple[str, str]) -> None:
    """In either order, each in a directory of its own."""
    diff_run(run, a=pair[0], b=pair[1])
    assert (run / "diff" / f"{pair[0]}--{pair[1]}" / "report.html").is_file()


def test_checkpoints_are_loaded_by_their_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, settings and tokenizer are all asked for at the revision; the error names it."""
    asked: list[tuple[str, str | None]] = []

    class Loader:
        @staticmethod
        def from_pretrained(path: str, *, revision: str | None = None, **settings: Any) -> None:
            asked.append((path, revision))
            raise OSError("no such revision")

    config = ModelConfig(path="someone/model", revision="step1000")
    for load in (loading.load_model, loading.load_tokenizer):
        monkeypatch.setattr("transformers.AutoConfig", Loader)
        monkeypatch.setattr("transformers.AutoTokenizer", Loader)
        with pytest.raises(ModelNotFound, match="at revision step1000"):
            load(config)
    assert asked == [("someone/model", "step1000")] * 2


def test_the_revision_is_recorded(run: Path) -> None:
    """One path at several revisions is several models; each is known by its own weights."""
    config = open_run(run).config
    named = {name: model.model_copy(update={"revision": name}) for name, model in config.models.items()}
    again = validate(RunConfig, config.model_copy(update={"models": named}).model_dump(mode="json"), name="again")
    assert [model.revision for model in again.models.values()] == ["step0", "step4", "step12"]
    recorded = Crosscoder.load(run / "crosscoder").provenance["models"]
    assert len({model["weights"] for model in recorded.values()}) == 3
