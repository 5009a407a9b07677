"""`crosscoder steer` on the command line: replies, figures and files, and every mistake on one screen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from crosscoder.cli.app import app
from crosscoder.cli.steering_options import chosen_doses, parse_doses, parse_tokens
from crosscoder.errors import ConfigError, EditError, EmptySelection
from crosscoder.interventions import AllTokens, Positions, PromptTokens, ReplyTokens, Roles


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def refusal(*arguments: object) -> str:
    """What standard error says where the user is at fault."""
    done = invoke(*arguments)
    assert done.exit_code == 2, done.stdout
    return done.stderr


@pytest.fixture
def run(run_path: Path, tmp_path: Path) -> Path:
    """A finished run on the toy pair."""
    assert invoke("train", run_path, "text.tokenizer=chat").exit_code == 0
    return tmp_path / "run"


def test_a_model_is_steered(run: Path, tmp_path: Path) -> None:
    assert "doses in multiples of the largest value need" in refusal("steer", run, "--latent", 3, "--prompt", "hello")
    assert invoke("evaluate", run).exit_code == 0
    asked = [
        "--latent",
        3,
        "--latent",
        5,
        "--prompt",
        "how do I mend a clock",
        "--prompt",
        "the dog",
        "--contains",
        "e",
    ]
    few = ["--max-new-tokens", 5, "--doses", "ablate,0,1.5,scale=2"]
    shown = invoke("steer", run, *asked, *few)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0] == "chat speaks; base clean beside it. Edited tokens: all. Dose 0: untouched."
    assert lines[1].startswith("A number is a multiple of each latent's largest value on the analysis set (")
    assert lines[3] == "<|bos|><|user|>how do I mend a clock<|end|><|assistant|>"
    assert [line.split()[0] for line in lines[4:8]] == ["ablate", "0", "+1.5", "scale"]
    assert any(line.startswith("dose") and "KL" in line for line in lines)
    assert "nats a token, on held-out text in which nobody speaks." in shown.stdout
    (place,) = (run / "steer").iterdir()
    assert place.name.startswith("chat-3-5-") and lines[-1] == f"The files are in {place}."
    found = {path.name for path in place.iterdir()}
    assert found == {"summary.json", "table.parquet", "completions.parquet", "rate.svg", "kl.svg"}
    table = pq.read_table(place / "table.parquet")
    assert table.schema.metadata[b"format"] == b"crosscoder.steering/1"
    assert table.column("dose").to_pylist() == ["ablate", "0", "+1.5", "scale 2"]
    assert table.column("total").to_pylist() == [2] * 4 and table.column("kl")[1].as_py() == 0
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    assert summary["format"] == "crosscoder.steering/1" and summary["latents"] == [3, 5]
    request = summary["request"]
    assert request["prompts"][1] == "<|bos|><|user|>the dog<|end|><|assistant|>" and request["tokens"] == "all"
    assert request["sampling"]["max_new_tokens"] == 5 and request["side_effects"]["text"] == summary["side_effects_on"]
    assert set(request["models"]) == {"base", "chat"} and len(request["fingerprint"]) == 32
    completions = pq.read_table(place / "completions.parquet").to_pylist()
    assert [row["prompt_text"] for row in completions[:2]] == request["prompts"]
    assert invoke("steer", run, *asked, *few, "--max-new-tokens", 4).exit_code == 0
    assert len(list((run / "steer").iterdir())) == 2, "another request has a directory of its own"
    edits = next(dose["edits"] for dose in summary["doses"] if dose["dose"] == "+1.5")
    largest = pq.read_table(run / "latents.parquet").column("max_value").to_pylist()
    assert edits[0]["values"] == pytest.approx([1.5 * largest[3], 1.5 * largest[5]])
    assert (place / "rate.svg").read_text(encoding="utf-8").startswith("<svg")


def test_files_of_prompts_samples_and_json(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "who are you"}]
    prompts.write_text(
        f"{json.dumps({'prompt': 'the hill'})}\n{json.dumps({'messages': messages})}\n", encoding="utf-8"
    )
    asked = ["--latent", 3, "--prompts", prompts, "--system", "be kind", "--model", "base", "--doses", "add=2"]
    more = ["--samples", 2, "--max-new-tokens", 4, "--tokens", "system,assistant", "--out", tmp_path / "here", "--json"]
    told = json.loads(invoke("steer", run, *asked, *more).stdout)
    place = Path(told["path"])
    assert place.parent == tmp_path / "here" / "steer" and told["speaker"] == "base" and told["num_samples"] == 2
    assert told["examples"][1]["prompt"] == "<|bos|><|system|>be kind<|end|><|user|>who are you<|end|><|assistant|>"
    assert pq.read_table(place / "completions.parquet").num_rows == 8, "dose 0 beside the one that was asked for"
    assert "rate" not in told["doses"][0], "no behaviour was looked for"
    plain = ["--prompt", "the hill", "--raw", "--ablate", "--max-new-tokens", 4, "--out", tmp_path / "raw"]
    raw = json.loads(invoke("steer", run, "--latent", 3, *plain, "--json").stdout)
    assert [dose["dose"] for dose in raw["doses"]] == ["0", "ablate"]
    assert raw["examples"][0]["prompt"] == "<|bos|>the hill"


def test_mistakes_are_one_message(run: Path, tmp_path: Path) -> None:
    ask = ["--prompt", "hello", "--max-new-tokens", 2]
    plain = [*ask, "--doses", "ablate"]
    assert "latents 0 to 63; got 64" in refusal("steer", run, "--latent", 64, *plain)
    assert "sources to edit that the crosscoder writes; got plain" in refusal(
        "steer", run, "--latent", 1, *plain, "--source", "plain"
    )
    assert "changes nothing that chat says" in refusal("steer", run, "--latent", 1, *plain, "--source", "base")
    assert "met no token" in refusal("steer", run, "--latent", 1, *plain, "--tokens", "system")
    assert "expected tokens to edit; got 'usher'" in refusal("steer", run, "--latent", 1, *plain, "--tokens", "usher")
    assert "not both; got --ablate and" in refusal("steer", run, "--latent", 1, *plain, "--ablate")
    assert "expected every latent once" in refusal("steer", run, "--latent", 1, "--latent", 1, *plain)
    assert "expected a model of this crosscoder to speak; got 'plain'" in refusal(
        "steer", run, "--latent", 1, *plain, "--model", "plain"
    )
    assert "expected a dose or a number; got 'twice'" in refusal("steer", run, "--latent", 1, *ask, "--doses", "twice")
    assert "expected --prompt or --prompts" in refusal("steer", run, "--latent", 1)
    assert "--contains or --regex" in refusal("steer", run, "--latent", 1, *plain, "--contains", "a", "--regex", "a")
    assert "holds special tokens" in refusal("steer", run, "--latent", 1, "--prompt", "<|end|>", "--doses", "ablate")
    reply = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert "ends with the assistant's reply" in refusal("steer", run, "--latent", 1, "--prompt", reply, "--doses", "0")
    config = run / "crosscoder" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["provenance"]["models"]["chat"]["weights"] = "0" * 32
    config.write_text(json.dumps(content), encoding="utf-8")
    message = refusal("steer", run, "--latent", 1, *plain)
    assert "ModelMismatch: the model chat is not the one" in message
    assert not (run / "steer").exists()


def test_doses_and_tokens_are_read() -> None:
    assert parse_doses("ablate, -1,0.5,scale=2,clamp=1,add=-.3") == [
        ("ablate", None), ("max", -1.0), ("max", 0.5), ("scale", 2.0), ("clamp", 1.0), ("add", -0.3)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="expected doses; got none"):
        parse_doses(" , ")
    for wrong in ("nan", "0,inf", "add=nan", "scale=-inf"):
        with pytest.raises(ConfigError, match="expected a finite dose"):
            parse_doses(wrong)
    assert chosen_doses(None, ablate=True) == [("max", 0.0), ("ablate", None)]
    assert chosen_doses("scale=2,1,scale=2", ablate=False) == [("max", 0.0), ("scale", 2.0), ("max", 1.0)]
    assert chosen_doses("1,0", ablate=False) == [("max", 1.0), ("max", 0.0)]
    assert ("max", 4.0) in chosen_doses(None, ablate=False)
    assert parse_tokens("all") == AllTokens() and parse_tokens("prompt") == PromptTokens()
    assert parse_tokens("reply") == ReplyTokens() and parse_tokens("reply:4") == ReplyTokens(first=4)
    assert parse_tokens("user, template") == Roles(("user", "template")) and parse_tokens("3,4") == Positions((3, 4))
    with pytest.raises(EmptySelection):
        parse_tokens("reply:0")
    for wrong in ("", "everyone", "reply:nan", "reply:2.5", "reply:x", "reply:", "3,user", "reply,prompt"):
        with pytest.raises(EditError, match="expected tokens to edit"):
            parse_tokens(wrong)


def test_runs_named_by_their_crosscoder_and_null_pairs(run: Path, run_path: Path, tmp_path: Path) -> None:
    """Results of RUN/crosscoder go to the run; a crosscoder alone needs --out; a null pair has no model to steer."""
    assert invoke("evaluate", run).exit_code == 0
    ask = ["--latent", 3, "--prompt", "hello", "--max-new-tokens", 2, "--doses", "1"]
    assert invoke("steer", run / "crosscoder", *ask).exit_code == 0
    assert len(list((run / "steer").iterdir())) == 1 and not (run / "crosscoder" / "steer").exists()
    alone = tmp_path / "alone"
    shutil.copytree(run / "crosscoder", alone)
    assert "where should results go?" in refusal("steer", alone, *ask)
    assert {path.name for path in alone.iterdir()} == {path.name for path in (run / "crosscoder").iterdir()}
    values = [
        "--latent",
        3,
        "--prompt",
        "hello",
        "--max-new-tokens",
        2,
        "--doses",
        "add=1",
        "--out",
        tmp_path / "there",
    ]
    assert invoke("steer", alone, *values).exit_code == 0
    assert len(list((tmp_path / "there" / "steer").iterdir())) == 1
    pair = "activations.null_pair={kind: identical, a: base, b: chat}"
    null = tmp_path / "null"
    assert invoke("train", run_path, "text.tokenizer=base", f"out={null}", pair).exit_code == 0
    assert "no model has what edits of a null pair would change" in refusal("steer", null, *ask)
