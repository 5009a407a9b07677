"""Runs on null pairs: ordinary runs that stop and go on bit for bit, and say what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crosscoder.analysis.opened_run import open_run
from crosscoder.capture.null_pair import Difference
from crosscoder.crosscoder import Crosscoder
from crosscoder.crosscoder_files import tensors_of
from crosscoder.errors import ConfigError, RunConflict
from crosscoder.training import checkpoint
from crosscoder.training.config import RunConfig
from crosscoder.training.run import train, train_together

NULL = ["activations.null_pair.a=base", "activations.null_pair.b=chat"]
STRUCTURELESS = ["activations.null_pair.kind=structureless", "activations.null_pair.num_rows=300", *NULL]
IDENTICAL = ["activations.null_pair.kind=identical", *NULL]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in tensors_of(Crosscoder.load(path / "crosscoder")).items()}


@pytest.mark.parametrize("null", [STRUCTURELESS, IDENTICAL], ids=["structureless", "identical"])
def test_a_null_run_that_stopped_goes_on_as_if_it_had_not(
    toy_run_file: Callable[..., Path], tmp_path: Path, null: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise, moments and place in the stream: the crosscoder is the same to the bit."""
    path = toy_run_file(num_tokens=640)
    whole = train(RunConfig.load(path, [*null, f"out={tmp_path / 'whole'}"])).path
    parts = RunConfig.load(path, [*null, f"out={tmp_path / 'parts'}"])
    save = checkpoint.save

    def save_and_stop(trainer, folder, *, stream):
        save(trainer, folder, stream=stream)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    train(parts)
    found, expected = tensors(tmp_path / "parts"), tensors(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_null_run_says_what_it_is_and_is_analysed_as_it_was_trained(
    toy_run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Card, provenance and fingerprint name the null pair; held-out rows are made up with the same difference."""
    path = toy_run_file(num_tokens=640)
    for name, null in (("noise", STRUCTURELESS), ("copy", IDENTICAL), ("real", [])):
        train(RunConfig.load(path, [*null, f"out={tmp_path / name}"]))
    card = (tmp_path / "noise" / "crosscoder" / "README.md").read_text()
    assert "A control, not of two models" in card and "chat := base + noise" in card
    assert "A control" not in (tmp_path / "real" / "crosscoder" / "README.md").read_text()
    noise, copy, real = (open_run(tmp_path / name) for name in ("noise", "copy", "real"))
    assert noise.crosscoder.provenance["null_pair"].startswith("chat := base + noise")
    assert noise.models_to_splice is None and set(real.models_to_splice or {}) == {"base", "chat"}
    rows = {
        name: torch.cat([b.x for b in run.activations().contexts()])
        for name, run in (("noise", noise), ("copy", copy), ("real", real))
    }
    width = rows["real"].shape[1] // 2
    assert all(torch.equal(x[:, :width], rows["real"][:, :width]) for x in rows.values())
    assert torch.equal(rows["copy"][:, :width], rows["copy"][:, width:])
    difference = Difference.load(tmp_path / "noise" / "null_pair.safetensors")
    made = (rows["noise"][:, width:] - rows["noise"][:, :width]).double()
    error = (made.mean(0) - difference.mean).abs() / difference.covariance.diagonal().sqrt()
    assert error.max() < 5 / len(made) ** 0.5
    assert not torch.allclose(rows["noise"][:, width:], rows["real"][:, width:])
    again = open_run(tmp_path / "noise" / "crosscoder", out=tmp_path / "elsewhere")
    assert again.fingerprint == noise.fingerprint


def test_without_its_directory_the_difference_is_measured_again(
    toy_run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """A crosscoder that was copied out of its run carries all that makes up its rows."""
    train(RunConfig.load(toy_run_file(num_tokens=640), [*STRUCTURELESS, f"out={tmp_path / 'run'}"]))
    home = open_run(tmp_path / "run")
    (tmp_path / "run" / "crosscoder").rename(tmp_path / "alone")
    alone = open_run(tmp_path / "alone", out=tmp_path / "results")
    for mine, theirs in zip(home.activations().contexts(), alone.activations().contexts(), strict=True):
        assert torch.equal(mine.x, theirs.x)


def test_bad_null_pairs_are_named_with_their_key(toy_run_file: Callable[..., Path]) -> None:
    """A pair that the run has not, one source twice, a kind without meaning, a kind's foreign key."""
    path = toy_run_file()
    with pytest.raises(ConfigError, match="chatt"):
        RunConfig.load(path, [*STRUCTURELESS, "activations.null_pair.b=chatt"])
    with pytest.raises(ConfigError, match="two sources of one width"):
        RunConfig.load(path, [*STRUCTURELESS, "activations.null_pair.b=base"])
    with pytest.raises(ConfigError, match="null_pair.kind: expected 'structureless', 'identical'"):
        RunConfig.load(path, [*NULL, "activations.null_pair.kind=nothing"])
    with pytest.raises(ConfigError, match="null_pair.seed: there is no such key"):
        RunConfig.load(path, [*IDENTICAL, "activations.null_pair.seed=3"])


def test_another_null_is_another_run(toy_run_file: Callable[..., Path], tmp_path: Path) -> None:
    """Directories and shared streams are of one null pair."""
    path = toy_run_file(num_tokens=640)
    noise = RunConfig.load(path, STRUCTURELESS)
    other = RunConfig.load(path, [*STRUCTURELESS, "activations.null_pair.seed=1", f"out={tmp_path / 'other'}"])
    train(noise)
    with pytest.raises(RunConflict, match="null_pair.seed: 1 / 0"):
        train(other.model_copy(update={"out": noise.out}))
    with pytest.raises(ConfigError, match="null_pair.seed"):
        train_together([noise, other])
