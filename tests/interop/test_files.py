"""Foreign files: which one is meant, what is refused, and that nothing in them runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError
from crosscoder.interop import convert
from crosscoder.nonlinearities import TopK
from crosscoder.sources import Source
from crosscoder.wiring import sae
from interop import foreign


class Runs:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_more_than_tensors_is_refused_and_does_not_run(tmp_path: Path) -> None:
    made, trace = foreign.learned(), tmp_path / "it-ran"
    torch.save({**made.tensors, "surprise": Runs(trace)}, tmp_path / "model_final.pt")
    with pytest.raises(FileFormatError, match="holds more than tensors") as caught:
        convert(tmp_path)
    assert "mkdir" in str(caught.value)
    assert not trace.exists()


def test_a_pickle_of_harmless_objects_is_refused_too(tmp_path: Path) -> None:
    torch.save({**foreign.learned().tensors, "where": tmp_path}, tmp_path / "model_final.pt")
    with pytest.raises(FileFormatError, match="found  pathlib"):
        convert(tmp_path)


def test_an_old_pickle_cut_short_is_not_called_dangerous(tmp_path: Path) -> None:
    path = tmp_path / "model_final.pt"
    torch.save(foreign.learned().tensors, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match="is not a whole"):
        convert(tmp_path, sites="embed")


@pytest.mark.parametrize("name", ["model_final.pt", "model.safetensors"])
def test_files_cut_short_are_told(tmp_path: Path, name: str) -> None:
    write = foreign.train_directory if name.endswith("pt") else foreign.pretrained_directory
    write(tmp_path, foreign.learned())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="is not a whole") as caught:
        convert(tmp_path)
    assert f"{len(whole) // 2:,} bytes" in str(caught.value)


def test_settings_that_are_not_json_are_told(tmp_path: Path) -> None:
    foreign.train_directory(tmp_path, foreign.learned())
    (tmp_path / "config.json").write_text("{'trainer': 1}", encoding="utf-8")
    with pytest.raises(FileFormatError, match="not whole JSON"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(FileFormatError, match="expected a JSON object"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "got a list"),
        ({"state_dict": {"W_enc": torch.zeros(3)}}, "state_dict: dict"),
        ({"weight": torch.zeros(3)}, "no layout that is known here"),
    ],
)
def test_pickles_of_other_things_are_told(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "thing.pt")
    with pytest.raises(FileFormatError, match=message):
        convert(tmp_path)


def test_the_layout_asked_for_must_be_the_one_found(tmp_path: Path) -> None:
    foreign.train_directory(tmp_path, foreign.learned())
    assert convert(tmp_path, layout="dictionary_learning").layout == "dictionary_learning"
    with pytest.raises(FileFormatError, match="in the layout ckkissane"):
        convert(tmp_path, layout="ckkissane")


def test_a_directory_of_checkpoints_asks_which(tmp_path: Path) -> None:
    made = foreign.learned()
    foreign.train_directory(tmp_path, made, name="checkpoint_100.pt")
    torch.save({"loss": torch.zeros(())}, tmp_path / "last_eval_logs.pt")
    assert convert(tmp_path).weights.name == "checkpoint_100.pt"
    foreign.train_directory(tmp_path, made, name="checkpoint_200.pt")
    with pytest.raises(FileFormatError, match="there are 2") as caught:
        convert(tmp_path)
    assert str(tmp_path / "checkpoint_200.pt") in str(caught.value)
    assert convert(tmp_path / "checkpoint_200.pt").weights.name == "checkpoint_200.pt"
    foreign.train_directory(tmp_path, made)
    assert convert(tmp_path).weights.name == "model_final.pt"


def test_an_empty_directory_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no weights") as caught:
        convert(tmp_path)
    assert "expected  cc_weights.pt" in str(caught.value)


def test_our_own_directories_are_not_foreign(tmp_path: Path) -> None:
    Crosscoder(sae(Source("base", "embed", 4), num_latents=8), TopK(2)).save(tmp_path / "run" / "crosscoder")
    for path in (tmp_path / "run", tmp_path / "run" / "crosscoder"):
        with pytest.raises(FileFormatError, match="of this package already"):
            convert(path)


@pytest.mark.parametrize("source", ["nowhere.pt", "./owner/name", "/no/such/file", "owner", "a/../b", "owner/na me"])
def test_what_is_neither_path_nor_hub_id_is_told(source: str) -> None:
    with pytest.raises(FileFormatError, match="expected a file, a directory, or a Hub id"):
        convert(source)


def test_a_hub_id_that_is_not_there_is_told() -> None:
    with pytest.raises(FileFormatError, match="neither a path here nor to be had from the Hub"):
        convert("owner/no-such-crosscoder")


def test_weights_of_another_suffix_are_told(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"as .pt or .safetensors"):
        convert(tmp_path / "weights.npz")


def test_paths_in_settings_are_never_opened(tmp_path: Path) -> None:
    """Names from files stay names: settings that point elsewhere change nothing."""
    made = foreign.learned()
    made.settings |= {"save_dir": "../../elsewhere", "lm_name": "../../model", "dict_class": "BatchTopKCrossCoder"}
    foreign.train_directory(tmp_path / "inner", made)
    (tmp_path / "elsewhere").mkdir()
    done = convert(tmp_path / "inner")
    done.crosscoder.save(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "inner", "out"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["provenance"]["converted"]["settings"]["lm_name"] == "../../model"
