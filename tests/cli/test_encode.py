"""`crosscoder encode` and `crosscoder recipes` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.conftest import write_run
from crosscoder.cli import encode as body
from crosscoder.cli.app import app


def invoke(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text, catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, toy_base_path: Path, toy_chat_path: Path, toy_text_path: Path
) -> Path:
    """A finished run on the toy pair; nothing is written into it."""
    directory = tmp_path_factory.mktemp("encode")
    file = write_run(directory, base=toy_base_path, chat=toy_chat_path, text=toy_text_path)
    assert invoke("train", file).exit_code == 0
    return directory / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def test_prompts_are_shown_token_by_token(run: Path, tmp_path: Path) -> None:
    shown = invoke("encode", run, "--prompt", "how do I mend a clock?", "--out", tmp_path / "page.html")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["0", "template", "'<|bos|>'", "not", "read"]
    assert any(line.split()[1:2] == ["user"] and ":" in line for line in lines)
    assert any(line.startswith("largest score") for line in lines)
    assert not any(line.startswith("most above its mean") for line in lines)  # not evaluated yet
    assert lines[-1] == f"Open the page: {tmp_path / 'page.html'}"
    assert "how" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert invoke("evaluate", run).exit_code == 0
    told = json.loads(invoke("encode", run, "--prompt", "how do I mend a clock?", "--json").stdout)
    assert set(told["prompts"][0]["latents"]) == {"max", "sum", "relative"}
    assert {"share_of_max", "relative_norm", "class"} <= set(told["prompts"][0]["latents"]["max"][0])
    one = told["prompts"][0]["latents"]["max"][0]["latent"]
    only = json.loads(invoke("encode", run, "--prompt", "how do I mend a clock?", "--latent", one, "--json").stdout)
    shown_latents = {latent["latent"] for token in only["prompts"][0]["tokens"] for latent in token["latents"]}
    assert shown_latents == {one}


def test_a_crosscoder_directory_and_standard_input_do_as_well(run: Path) -> None:
    at_run = json.loads(invoke("encode", run, "--json", text="a small\nbrown dog\n").stdout)
    (run / "latents.parquet").write_bytes(b"no table")  # the run's, whichever way the run is named
    for name in (run, run / "crosscoder"):
        assert invoke("encode", name, "--json", text="a dog").exit_code == 2
    (run / "latents.parquet").unlink()
    elsewhere = run.with_name("alone")
    (run / "crosscoder").rename(elsewhere)
    alone = json.loads(invoke("encode", elsewhere, "--json", text="a small\nbrown dog\n").stdout)
    assert alone == at_run and len(alone["prompts"]) == 1
    lines = json.loads(invoke("encode", elsewhere, "--prompts", "-", "--json", text="a small\nbrown dog\n").stdout)
    assert len(lines["prompts"]) == 2
    raw = json.loads(invoke("encode", elsewhere, "--raw", "--json", text="a dog").stdout)
    assert {token["role"] for token in raw["prompts"][0]["tokens"]} == {"template", "text"}


def test_two_files_are_contrasted(trained: Path, tmp_path: Path) -> None:
    for name, word in (("a", "rain came down on the town"), ("b", "a small brown dog ran over the hill")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{word} {n}\n" for n in range(16)))
    files = "--prompts", tmp_path / "a.txt", "--contrast", tmp_path / "b.txt"
    shown = invoke("encode", trained, *files, "--top", 4).stdout
    assert shown.startswith("A 16 prompts   B 16 prompts")
    assert "held-out half" in shown and len(shown.splitlines()) == 4 + 1 + 1 + 4
    told = json.loads(invoke("encode", trained, *files, "--json").stdout)
    assert told["format"] == "crosscoder.contrast/1" and len(told["latents"]) == 5
    best = told["latents"][0]
    assert best["auroc"] in (0.0, 1.0) and best["fires_on_a"] != best["fires_on_b"]
    assert told["held_out"]["scoring"]["num_tested"] == told["held_out"]["choosing"]["num_found"]
    one = json.loads(invoke("encode", trained, *files, "--latent", best["latents"], "--json").stdout)
    assert one["held_out"]["choosing"]["num_tested"] == 1
    assert one["num_tested"] == 1 and one["latents"][0]["auroc"] == best["auroc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "TextError: the prompt is empty"),
        (["--prompt", "say <|assistant|>"], "TextError: the prompt holds special tokens"),
        (["--prompt", "word " * 300], "tokens long; the models were made for 256"),
        (["--prompts", "nowhere.txt"], "TextError: expected a text file of prompts at nowhere.txt"),
        (["--prompt", "a dog", "--latent", "64"], "UnknownLatent: this crosscoder has latents 0 to 63; got 64"),
        (["--prompt", "a dog", "--prompts", "x.txt"], "ConfigError: expected --prompt or --prompts, not both"),
        (["--prompt", "a dog", "--contrast", "nowhere.txt"], "TextError: expected a text file of prompts"),
        (["--prompt", "a", "--contrast", "x.txt", "--out", "x.html"], "ConfigError: --out writes the page of prompts"),
    ],
)
def test_mistakes_are_one_screen(trained: Path, arguments: list[str], message: str) -> None:
    result = invoke("encode", trained, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr


def test_models_that_changed_since_are_refused(run: Path) -> None:
    config = run / "crosscoder" / "config.json"
    content = json.loads(config.read_text())
    content["provenance"]["models"]["chat"]["weights"] = "0" * 32
    config.write_text(json.dumps(content))
    result = invoke("encode", run, "--prompt", "a dog")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].strip().startswith("Give the model as it was then")
    assert "ModelMismatch: the model chat is not the one that the crosscoder was trained on." in result.stderr


def test_a_terminal_obeys_nothing_in_a_token() -> None:
    assert body._shown("a\x1b[2J\u202e\n\ud800") == "'a\\x1b[2J\\u202e\\n\\ud800'"


def test_recipes_are_listed_printed_and_written(tmp_path: Path) -> None:
    listed = invoke("recipes").stdout
    assert "kissane-gemma-2-2b" in listed and "lindsey-18-layers" in listed
    assert {"name", "title", "source"} <= set(json.loads(invoke("recipes", "--json").stdout)[0])
    printed = invoke("recipes", "kissane-gemma-2-2b", "train.num_tokens=1000").stdout
    assert printed.startswith("# ") and yaml.safe_load(printed)["train"]["num_tokens"] == 1000
    file = tmp_path / "run.yaml"
    assert f"crosscoder train {file} --dry-run" in invoke("recipes", "kissane-gemma-2-2b", "--out", file).stdout
    assert file.read_text(encoding="utf-8") == invoke("recipes", "kissane-gemma-2-2b").stdout
    again = invoke("recipes", "kissane-gemma-2-2b", "--out", file)
    assert again.exit_code == 2 and "is there already" in again.stderr
    told = json.loads(invoke("recipes", "lindsey-18-layers", "seed=3", "--json").stdout)
    assert told["run"]["seed"] == 3 and told["departures"]
    assert "Did you mean" in invoke("recipes", "kissane").stderr
