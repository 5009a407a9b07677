"""Evaluating and diffing a whole run: the files, what they hold, and the errors when something is missing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from crosscoder.analysis import CrossEntropy, Labelled, diff_run, evaluate_run
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.analysis.tables import read_table
from crosscoder.capture.corpus import Corpus
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import (
    ConfigError,
    CrosscoderError,
    FileFormatError,
    ModelMismatch,
    RunConflict,
    SourceMismatch,
)
from crosscoder.training.config import RunConfig, SaeConfig
from crosscoder.training.json_numbers import json_values
from crosscoder.training.run import train
from crosscoder.training.runfile import override, validate

from .worlds import random_crosscoder

SITE = "layers.0.resid_post"


@pytest.fixture(scope="module")
def config(toy_base_path: Path, toy_chat_path: Path, toy_text_path: Path, tmp_path_factory) -> RunConfig:
    """A run of a few steps on the toy pair."""
    raw = {
        "models": {
            "base": {"path": str(toy_base_path), "dtype": "float32"},
            "chat": {"path": str(toy_chat_path), "dtype": "float32"},
        },
        "sources": [f"base/{SITE}", f"chat/{SITE}"],
        "text": {
            "tokenizer": "base",
            "context_length": 64,
            "packing": "document",
            "mix": [{"dataset": str(toy_text_path)}],
            "held_out": {"fraction": 0.3, "num_tokens": 1000},
        },
        "activations": {"buffer_gb": 0.001},
        "normaliser": {"num_tokens": 512},
        "wiring": {"kind": "acausal", "num_latents": 48},
        "nonlinearity": {"kind": "batch_topk", "k": 4},
        "train": {"num_tokens": 2560, "batch_size": 256, "learning_rate": 1e-3},
        "out": str(tmp_path_factory.mktemp("runs") / "toy"),
    }
    return validate(RunConfig, raw, name="toy run")


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> Path:
    """The finished run."""
    return train(config).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to write into."""
    return shutil.copytree(trained, tmp_path / "toy")


def labels_for(run: Path, path: Path) -> Path:
    """Labels on the held-out documents: every other one is said to act on its first twenty characters."""
    lines = [json.dumps({"format": "crosscoder.labels/1"})]
    for number, document in enumerate(open_run(run).text.documents):
        label = {"context": document.hash, "span": [0, 20], "label": "even", "value": number % 2 == 0}
        lines.append(json.dumps(label))
    path.write_text("\n".join(lines))
    return path


def test_evaluate_writes_three_files_that_agree(run: Path) -> None:
    """The numbers returned are the numbers written; the tables are keyed by latent and say their format."""
    told = []
    evaluation = evaluate_run(run, num_ce_tokens=300, num_exemplars=3, progress=lambda *what: told.append(what))
    written = json.loads((run / "evaluation.json").read_text())
    assert written["format"] == "crosscoder.evaluation/1" and written["fve"] == evaluation.fve
    assert written["num_rows"] == evaluation.num_rows == int(open_run(run).text.kept.sum())
    assert set(evaluation.ce_recovered) == {f"base/{SITE}", f"chat/{SITE}"}
    latents = read_table(run / "latents.parquet", thing="latents")
    assert latents["latent"].to_pylist() == list(range(48))
    np.testing.assert_allclose(latents["density"].to_numpy(), evaluation.density.numpy(), rtol=1e-6)
    assert pq.read_schema(run / "exemplars.parquet").metadata[b"format"] == b"crosscoder.exemplars/1"
    assert {description for description, _, _ in told} >= {"reading activations", "splicing into the models"}


def test_exemplars_cite_tokens_of_the_analysis_set(run: Path) -> None:
    """Every window is a stretch of its context; its peak token has the exemplar's value; encoding again gives it."""
    evaluate_run(run, num_ce_tokens=100)
    opened = open_run(run)
    rows = read_table(run / "exemplars.parquet", thing="exemplars").to_pylist()
    code = {}
    for batch in opened.activations().contexts():
        dense = opened.crosscoder.encode(batch.x).to_dense().detach()
        code |= {
            place: row
            for place, row in zip(
                zip(*(p.tolist() for p in (batch.rows.context, batch.rows.position)), strict=True), dense, strict=True
            )
        }
    assert rows
    for row in rows:
        context = opened.text.context(row["context"])
        first, length = row["first_position"], len(row["token_ids"])
        assert context.tokens.ids[first : first + length].tolist() == row["token_ids"]
        assert row["values"][row["position"] - first] == pytest.approx(row["value"])
        assert float(code[row["context"], row["position"]][row["latent"]]) == pytest.approx(row["value"], rel=1e-4)
        assert "".join(row["pieces"]) == opened.tokenizer.decode(row["token_ids"])
        assert (row["values"][0] is None) == (first == 0)


def test_diff_writes_a_directory_for_the_pair(run: Path, tmp_path: Path) -> None:
    """Evaluates when that was not done, then writes table, summary and report; aliases name the directory."""
    diff = diff_run(run, labels=labels_for(run, tmp_path / "labels.jsonl"))
    assert diff.path == run / "diff" / "base--chat" and (run / "evaluation.json").exists()
    summary = json.loads((diff.path / "summary.json").read_text())
    assert summary["format"] == "crosscoder.diff/2" and summary["classes"] == diff.classes.counts
    assert summary["labels"]["labels"][0]["label"] == "even"
    table = read_table(diff.path / "latents.parquet", thing="diff_latents")
    assert {"latent", "density", "class", "relative_norm", "cosine"} <= set(table.column_names)
    html = diff.report.read_text()
    assert html.startswith("<!doctype html>") and "promotes" in html and "This report has no null controls" in html


def test_numbers_that_are_none_are_null_in_json() -> None:
    """NaN and infinity, however deep, are not JSON."""
    content = {"a": [1.0, float("nan")], "b": {"c": (float("inf"), "x", 3)}}
    assert json_values(content) == {"a": [1.0, None], "b": {"c": [None, "x", 3]}}
    assert math.isnan(CrossEntropy(2.0, 2.0, 2.0, 3.0, 10).recovered)


def test_a_diff_evaluates_again_when_the_crosscoder_is_another(run: Path) -> None:
    """Results of other weights are not taken for these."""
    diff_run(run)
    before = json.loads((run / "evaluation.json").read_text())
    diff_run(run, a="chat", b="base")
    assert json.loads((run / "evaluation.json").read_text()) == before
    crosscoder = Crosscoder.load(run / "crosscoder")
    with torch.no_grad():
        crosscoder.weights[0].decoder.mul_(0.5)
    crosscoder.save(run / "crosscoder")
    diff_run(run)
    after = json.loads((run / "evaluation.json").read_text())
    assert after["fingerprint"] != before["fingerprint"] and after["fve"] < before["fve"]


def test_the_other_way_round_is_the_mirror_image(run: Path) -> None:
    """Swapping a and b swaps the sides and nothing else."""
    forth, back = diff_run(run, a="base", b="chat"), diff_run(run, a="chat", b="base")
    torch.testing.assert_close(forth.classes.relative_norm, 1 - back.classes.relative_norm)
    assert back.path.name == "chat--base"


def test_a_crosscoder_alone_brings_its_configuration(run: Path, tmp_path: Path) -> None:
    """A copied crosscoder makes the same analysis set again and gives the same numbers."""
    alone = shutil.copytree(run / "crosscoder", tmp_path / "copied")
    with pytest.raises(ConfigError, match="where should results go"):
        evaluate_run(alone)
    there = evaluate_run(alone, out=tmp_path / "results", num_ce_tokens=100)
    assert there.fve == evaluate_run(run, num_ce_tokens=100).fve
    assert open_run(run / "crosscoder").out == run


def test_the_set_is_rendered_with_the_tokenizer_of_the_text(
    config: RunConfig, toy_chat_path: Path, tmp_path: Path
) -> None:
    """Chat templates differ: the set that a bare crosscoder makes again is that of `text.tokenizer`."""
    chat = shutil.copytree(toy_chat_path, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|><|eos|>")
    tokenizer.save_pretrained(chat)
    turns = [{"messages": [{"role": "user", "content": f"is it {n} ?"}]} for n in range(30)]
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    overrides = [f"models.chat.path={chat}", "text.tokenizer=chat", f"text.mix.0.dataset={dialogues}"]
    overrides += ["text.mix.0.column=messages", "text.mix.0.chat=true"]
    raw = override(config.model_dump(mode="json"), overrides, schema=RunConfig)
    changed = validate(RunConfig, raw, name="chat run")
    wanted = Corpus(changed.text, tokenizer, seed=changed.seed).held_out()
    assert 2 in wanted.token_ids  # <|eos|>
    opened = OpenedRun(random_crosscoder(), changed, tmp_path / "out")
    assert opened.text.hash == wanted.hash


def test_results_of_two_crosscoders_do_not_share_a_set(
    trained: Path, run: Path, config: RunConfig, tmp_path: Path
) -> None:
    """A run's own set goes first, wherever results go; a directory that holds another text's set is refused."""
    other = validate(RunConfig, config.model_dump(mode="json") | {"seed": 5, "out": str(tmp_path / "b")}, name="b")
    b = train(other).path
    assert open_run(b).text.hash != open_run(run).text.hash
    assert open_run(b, out=tmp_path / "elsewhere").text.hash == open_run(b).text.hash
    alone = [shutil.copytree(path / "crosscoder", tmp_path / f"alone-{path.name}") for path in (run, b)]
    results = tmp_path / "results"
    assert open_run(alone[0], out=results).text.hash == open_run(run).text.hash
    assert open_run(alone[0], out=results).text.hash == open_run(run).text.hash
    for stranger in (alone[1], b):
        with pytest.raises(RunConflict, match="analysis set of another text"):
            _ = open_run(stranger, out=results).text


def test_a_baseline_stands_beside(run: Path, config: RunConfig, tmp_path: Path) -> None:
    """An autoencoder of base alone is scored on the same labels."""
    changes = {"sources": config.sources[:1], "wiring": SaeConfig(num_latents=16), "out": str(tmp_path / "sae")}
    baseline = train(config.model_copy(update=changes)).path
    diff = diff_run(run, labels=Labelled(labels_for(run, tmp_path / "labels.jsonl"), baseline=baseline))
    assert "baseline latent" in [score.detector for score in diff.labels.labels[0].scores]
    with pytest.raises(SourceMismatch, match="writes one"):
        diff_run(baseline)


def test_other_models_than_the_recorded_ones_are_refused(run: Path, toy_base_path: Path) -> None:
    """Weights that changed under the same path: no report of the one with the hashes of the other."""
    content = (run / "run.yaml").read_text()
    chat = RunConfig.load(run / "run.yaml").models["chat"].path
    (run / "run.yaml").write_text(content.replace(chat, str(toy_base_path)))
    with pytest.raises(ModelMismatch, match="chat"):
        diff_run(run)
    assert not (run / "diff").exists()


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    """No run, an unfinished run, a crosscoder without a record, sources that are not named."""
    with pytest.raises(FileFormatError, match="expected a directory with a crosscoder"):
        evaluate_run(tmp_path / "nothing")
    with pytest.raises(SourceMismatch, match="which two"):
        diff_run(run, a="base")
    with pytest.raises(CrosscoderError, match="no file|there is none"):
        diff_run(run, labels=tmp_path / "none.jsonl")
    crosscoder = Crosscoder.load(run / "crosscoder")
    crosscoder.provenance = {}
    crosscoder.save(tmp_path / "bare")
    with pytest.raises(FileFormatError, match="does not say which models"):
        evaluate_run(tmp_path / "bare", out=tmp_path / "out")
    shutil.rmtree(run / "crosscoder")
    with pytest.raises(RunConflict, match="not finished"):
        evaluate_run(run)
    assert not (tmp_path / "out").exists() and not (run / "diff").exists()
