"""The ckkissane layout: codes and reconstructions against the published formulas, and its hazards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, FileFormatError, SourceMismatch
from crosscoder.interop import convert
from crosscoder.interop.ckkissane import PUBLISHED, site_of
from interop import foreign

SCALES = {"base": 0.3, "chat": 1.7}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return foreign.kissane_files(tmp_path / "version_1", foreign.kissane(), foreign.kissane_settings(), hub=False)


@pytest.mark.parametrize("hub", [False, True])
def test_codes_and_reconstructions_are_those_of_the_formulas(tmp_path: Path, hub: bool) -> None:
    tensors, x = foreign.kissane(), foreign.rows()
    folder = tmp_path / "blocks.14.hook_resid_pre"
    foreign.kissane_files(folder, tensors, foreign.kissane_settings(), hub=hub)
    cc = convert(tmp_path if hub else folder / "3.pt", scales=SCALES).crosscoder.double()
    f, y = foreign.kissane_codes(tensors, x, torch.tensor([0.3, 1.7]))
    assert 0.2 < (f > 0).double().mean() < 0.8
    code = cc.encode(x.flatten(1))
    torch.testing.assert_close(code.to_dense(), f, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cc.decode(code), y.flatten(1), rtol=1e-6, atol=1e-6)


def test_scales_matter_and_decoder_norms_stay_those_of_the_file(files: Path) -> None:
    tensors = foreign.kissane()
    cc = convert(files, scales=SCALES).crosscoder
    torch.testing.assert_close(cc.decoder_norms("normalised"), tensors["W_dec"].norm(dim=2))
    torch.testing.assert_close(cc.decoder_norms("raw"), tensors["W_dec"].norm(dim=2) / torch.tensor([0.3, 1.7]))
    swapped = convert(files, scales=[1.7, 0.3]).crosscoder
    x = foreign.rows().float().flatten(1)
    assert not torch.allclose(cc(x), swapped(x), atol=0.1)


def test_unknown_scales_are_asked_for(files: Path) -> None:
    with pytest.raises(ConfigError, match="do not say what activations were multiplied by") as caught:
        convert(files)
    assert "--scales" in str(caught.value)
    assert "0.2758961493232058" in str(caught.value)


def test_published_weights_have_known_scales_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = PUBLISHED
    commit = tmp_path / "c0ffee"
    foreign.kissane_files(commit / "blocks.14.hook_resid_pre", foreign.kissane(), foreign.kissane_settings(), hub=True)
    asked: dict[str, Any] = {}

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for source in (name, f"{name}/blocks.14.hook_resid_pre"):
        done = convert(source, revision="main")
        assert asked["repository"] == name
        assert all(pattern.endswith(("json", "safetensors", "cc_weights.pt")) for pattern in asked["patterns"])
        assert torch.equal(done.crosscoder.scale, torch.tensor(PUBLISHED[name]))
        assert done.crosscoder.provenance["models"]["chat"] == {"path": "google/gemma-2-2b-it"}
        assert done.crosscoder.provenance["converted"]["commit"] == "c0ffee"
        assert any("notebook" in line for line in done.assumed)


def test_sites_and_models_are_named_by_convention_and_said(files: Path) -> None:
    done = convert(files, scales=SCALES)
    assert done.crosscoder.sources.keys == ("base/layers.13.resid_post", "chat/layers.13.resid_post")
    assert any("convention" in line for line in done.assumed)
    assert any("layers.14.resid_pre" in line for line in done.assumed)
    named = convert(files, models={"a": "org/a", "b": None}, sites="embed", scales=[1, 1])
    assert named.crosscoder.sources.keys == ("a/embed", "b/embed")
    assert named.crosscoder.provenance["models"] == {"a": {"path": "org/a"}, "b": {"path": None}}


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.0.hook_resid_pre", "layers.0.resid_pre"),
        ("blocks.14.hook_mlp_out", "layers.14.mlp_out"),
        ("blocks.3.hook_attn_out", "layers.3.attn_out"),
        ("blocks.3.ln2.hook_normalized", None),
        ("../../etc", None),
    ],
)
def test_hook_names_become_sites(hook: str, site: str | None) -> None:
    assert site_of({"hook_point": hook}, "folder") == site
    assert site_of({}, hook) == site


def test_without_settings_the_site_is_asked_for(tmp_path: Path) -> None:
    path = foreign.kissane_files(tmp_path / "somewhere", foreign.kissane(), None, hub=False)
    with pytest.raises(ConfigError, match="where in the models the activations are from"):
        convert(path, scales=SCALES)
    assert convert(path, sites="embed", scales=SCALES).crosscoder.sources.keys == ("base/embed", "chat/embed")


def test_many_layers_of_one_model_are_named_by_sites(tmp_path: Path) -> None:
    tensors, x = foreign.kissane(sources=3), foreign.rows(sources=3)
    path = foreign.kissane_files(tmp_path / "gpt2", tensors, {"name": "lambda_2_64k"}, hub=False)
    sites = [f"layers.{layer}.resid_pre" for layer in range(3)]
    cc = convert(path, sites=sites, scales=[0.5, 0.4, 0.3]).crosscoder.double()
    assert cc.sources.keys == ("base/embed", "base/layers.0.resid_post", "base/layers.1.resid_post")
    _, y = foreign.kissane_codes(tensors, x, torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(cc(x.flatten(1)), y.flatten(1), rtol=1e-6, atol=1e-6)


def test_a_number_of_sources_that_no_convention_names_is_asked_about(tmp_path: Path) -> None:
    path = foreign.kissane_files(tmp_path, foreign.kissane(sources=3), None, hub=False)
    with pytest.raises(ConfigError, match="has 3 sources and does not name them") as caught:
        convert(path, sites="embed", scales=[1, 1, 1])
    assert "--models" in str(caught.value)
    with pytest.raises(SourceMismatch, match="1 models × 1 sites"):
        convert(path, sites="embed", models="abc", scales=[1, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["a"]}, "2 sources; 1 models × 1 sites make 1"),
        ({"models": ["a", "b", "c"]}, "3 models × 1 sites make 3"),
        ({"sites": ["embed", "layers.0.resid_post"], "models": ["a", "b"]}, "2 models × 2 sites make 4"),
    ],
)
def test_names_of_another_number_are_refused(files: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(SourceMismatch, match=message):
        convert(files, scales=[1, 1], **change)


@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.0], [1.0, float("nan")], {"base": 1.0}, {"base": 1.0, "cat": 2.0}])
def test_scales_that_do_not_fit_are_refused(files: Path, scales: object) -> None:
    with pytest.raises(ConfigError, match="one positive scale for each of 2 sources"):
        convert(files, scales=scales)


def test_scales_may_be_given_by_source(files: Path) -> None:
    by_source = {"base/layers.13.resid_post": 0.3, "chat/layers.13.resid_post": 1.7}
    assert torch.equal(convert(files, scales=by_source).crosscoder.scale, torch.tensor([0.3, 1.7]))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b_enc", None, "missing  b_enc"),
        ("b_dec", torch.zeros(foreign.S, foreign.D + 1), r"shape    b_dec: expected \(2, 5\), got \(2, 6\)"),
        ("W_dec", torch.zeros(foreign.S, foreign.N, foreign.D), r"shape    W_dec: expected \(12, 2, 5\)"),
        ("W_enc", torch.full((foreign.S, foreign.D, foreign.N), float("nan")), "NaN/inf  W_enc"),
        ("W_skip", torch.zeros(3), "unknown  W_skip"),
    ],
)
def test_damaged_files_are_told_tensor_by_tensor(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = foreign.kissane()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    path = foreign.kissane_files(tmp_path, tensors, foreign.kissane_settings(), hub=False)
    with pytest.raises(FileFormatError, match=message):
        convert(path, scales=SCALES)


def test_saved_and_loaded_again_it_is_the_same_and_says_where_it_is_from(files: Path, tmp_path: Path) -> None:
    cc = convert(files, scales=SCALES).crosscoder
    again = Crosscoder.load(cc.save(tmp_path / "out"))
    x = foreign.rows().float().flatten(1)
    assert torch.equal(again(x), cc(x))
    said = again.provenance["converted"]
    assert said["layout"] == "ckkissane"
    assert said["weights"] == "3.pt"
    assert said["settings"]["model_name"] == "gemma-2-2b"
    assert "wandb_entity" not in said["settings"]
