"""`crosscoder convert`: there and back, with what was assumed on the screen, and nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from crosscoder.cli.app import app
from crosscoder.crosscoder import Crosscoder
from interop import foreign


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *(str(argument) for argument in arguments)], catch_exceptions=False)


@pytest.fixture
def kissane(tmp_path: Path) -> Path:
    return foreign.kissane_files(tmp_path / "in", foreign.kissane(), foreign.kissane_settings(), hub=True)


def test_a_foreign_crosscoder_becomes_a_directory_that_loads(kissane: Path, tmp_path: Path) -> None:
    done = invoke(kissane.parent, "--scales", "base=0.3,chat=1.7", "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert "layout   ckkissane" in done.stdout
    assert "assumed  the first source is the base model, the second the chat model" in done.stdout
    cc = Crosscoder.load(tmp_path / "out").double()
    x = foreign.rows()
    f, _ = foreign.kissane_codes(foreign.kissane(), x, torch.tensor([0.3, 1.7]))
    torch.testing.assert_close(cc.encode(x.flatten(1)).to_dense(), f, rtol=1e-6, atol=1e-6)


def test_json_says_the_same(kissane: Path, tmp_path: Path) -> None:
    done = invoke(
        *(kissane, "--from", "ckkissane", "--models", "a=org/a,b=org/b", "--site", "embed", "--scales", "1,1"),
        *("--out", tmp_path / "out", "--json"),
    )
    printed = json.loads(done.stdout)
    assert printed["sources"] == ["a/embed", "b/embed"]
    assert printed["out"] == str(tmp_path / "out")
    assert printed["warnings"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["provenance"]["models"] == {"a": {"path": "org/a"}, "b": {"path": "org/b"}}
    assert config["provenance"]["converted"]["assumed"] == printed["assumed"]


def test_there_and_back_again(tmp_path: Path) -> None:
    theirs = foreign.learned(norm="SAE", normaliser="per_source")
    foreign.train_directory(tmp_path / "in", theirs)
    assert invoke(tmp_path / "in", "--out", tmp_path / "ours").exit_code == 0
    done = invoke(tmp_path / "ours", "--to", "dictionary_learning", "--out", tmp_path / "back", "--json")
    assert json.loads(done.stdout)["layout"] == "dictionary_learning"
    assert invoke(tmp_path / "back", "--out", tmp_path / "again").exit_code == 0
    first, second = Crosscoder.load(tmp_path / "ours"), Crosscoder.load(tmp_path / "again")
    x = foreign.rows().float().flatten(1)
    torch.testing.assert_close(first(x), second(x), rtol=1e-5, atol=1e-5)


def test_warnings_are_shown_and_saved(tmp_path: Path) -> None:
    theirs = foreign.learned()
    foreign.pretrained_directory(tmp_path / "in", theirs, k=100)
    done = invoke(tmp_path / "in", "--site", "embed", "--out", tmp_path / "out")
    assert "warning: model.safetensors: the settings say k = 100, the tensor k 3: tensor taken" in done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["provenance"]["converted"]["warnings"] == ["the settings say k = 100, the tensor k 3: tensor taken"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ConfigError: files of this layout do not say what activations were multiplied by"),
        (["--scales", "base=x"], "ConfigError: expected numbers in --scales"),
        (["--scales", "1,1", "--models", "a,a"], "ConfigError: expected different names in --models"),
        (["--scales", "1,1", "--models", "a,b,c"], "SourceMismatch: the file has 2 sources"),
        (["--scales", "1,1", "--site", "layers.1.nowhere"], "UnsupportedSite: "),
        (["--from", "dictionary_learning"], "FileFormatError: "),
        (
            ["--to", "ckkissane", "--scales", "1,1"],
            "ConfigError: --from, --models, --site and --scales are for",
        ),
    ],
)
def test_mistakes_are_one_screen_and_leave_nothing(
    kissane: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = invoke(kissane, *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith(message)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_files_is_not_replaced(kissane: Path) -> None:
    done = invoke(kissane, "--scales", "1,1", "--out", kissane.parent)
    assert done.exit_code == 2
    assert "saving there would replace it" in done.stderr
    assert kissane.exists()


def test_out_is_required(kissane: Path) -> None:
    done = invoke(kissane)
    assert done.exit_code == 2
    assert "--out" in done.stderr
