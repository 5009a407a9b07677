"""The dictionary_learning layouts: codes and reconstructions against the published formulas, and each hazard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, FileFormatError, NotCalibrated
from crosscoder.interop import Conversion, convert
from crosscoder.nonlinearities import BatchTopK, JumpReLU, ReLU
from interop import foreign
from interop.foreign import NAN, Learned

SITE = "layers.13.resid_post"


def converted(directory: Path, made: Learned, **options: Any) -> Conversion:
    foreign.train_directory(directory, made)
    return convert(directory, **options)


def assert_same(cc: Crosscoder, made: Learned, x: Tensor) -> None:
    """The same codes and reconstructions as the tool's, in fp64."""
    cc = cc.double()
    f, y = made.codes(x)
    assert 0.05 < (f > 0).double().mean() < 0.8
    code = cc.encode(x[:, [cc.sources.index(key) for key in cc.reads.keys]].flatten(1))
    assert torch.equal(code.to_dense() > 0, f > 0)
    torch.testing.assert_close(code.to_dense(), f, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cc.decode(code), y.flatten(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normaliser", ["none", "per_source", "scalar"])
@pytest.mark.parametrize("norm", ["CROSSCODER", "SAE", "NONE", "MIXED"])
@pytest.mark.parametrize("top_k", [True, False])
def test_codes_and_reconstructions_are_those_of_the_formulas(
    tmp_path: Path, norm: str, top_k: bool, normaliser: str
) -> None:
    made = foreign.learned(norm=norm, top_k=top_k, normaliser=normaliser)
    cc = converted(tmp_path, made).crosscoder
    assert cc.sources.keys == (f"base/{SITE}", f"chat/{SITE}")
    assert_same(cc, made, foreign.rows())
    again = Crosscoder.load(cc.save(tmp_path / "out"))
    assert_same(again, made, foreign.rows(seed=4))


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("CROSSCODER", BatchTopK(3, code_norm="sum")),
        ("SAE", BatchTopK(3, code_norm="concat")),
        ("NONE", BatchTopK(3, code_norm="none")),
        ("MIXED", JumpReLU()),
    ],
)
def test_code_norms_become_nonlinearities(tmp_path: Path, norm: str, expected: object) -> None:
    cc = converted(tmp_path, foreign.learned(norm=norm)).crosscoder
    assert cc.nonlinearity == expected
    gate = cc.gate.clone()
    if isinstance(expected, BatchTopK):
        cc.refresh_gate()
        torch.testing.assert_close(cc.gate, gate)  # training would go on from the same gate


def test_relu_has_no_threshold(tmp_path: Path) -> None:
    done = converted(tmp_path, foreign.learned(top_k=False))
    assert done.crosscoder.nonlinearity == ReLU()
    assert any("the sparsity penalty was on f · c" in line for line in done.assumed)


def test_decoder_norms_stay_those_of_the_file(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    norms = converted(tmp_path, made).crosscoder.decoder_norms("normalised")
    torch.testing.assert_close(norms, made.tensors["decoder.weight"].norm(dim=2).T)


def test_a_pretrained_directory_is_read_like_a_train_directory(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    foreign.pretrained_directory(tmp_path, made)
    with pytest.raises(ConfigError, match="where in the models"):
        convert(tmp_path)
    done = convert(tmp_path, sites=SITE)
    assert done.warnings == ()
    assert_same(done.crosscoder, made, foreign.rows())


def test_what_the_trainer_was_told_lies_beside_a_published_one(tmp_path: Path) -> None:
    made = foreign.learned()
    foreign.pretrained_directory(tmp_path, made)
    (tmp_path / "trainer_config.json").write_text('{"trainer": {"layer": 7}}', encoding="utf-8")
    assert convert(tmp_path).crosscoder.sources.keys == ("base/layers.7.resid_post", "chat/layers.7.resid_post")


# -- hazards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-1.0, NAN])
def test_a_threshold_that_was_never_set_is_refused(tmp_path: Path, threshold: float) -> None:
    made = foreign.learned()
    made.tensors["threshold"] = torch.tensor(threshold)
    with pytest.raises(NotCalibrated, match="was never set") as caught:
        converted(tmp_path, made)
    assert "uncalibrated=True" in str(caught.value)
    done = convert(tmp_path, uncalibrated=True)
    assert any("calibrate" in line for line in done.warnings)
    x = foreign.rows().float().flatten(1)
    with pytest.raises(NotCalibrated):
        done.crosscoder.encode(x)
    done.crosscoder.calibrate([x])
    assert 2.5 < done.crosscoder.eval().encode(x).l0 < 3.5


def test_mixed_without_a_threshold_cannot_be_calibrated_later(tmp_path: Path) -> None:
    made = foreign.learned(norm="MIXED")
    made.tensors["threshold"] = torch.tensor(-1.0)
    with pytest.raises(NotCalibrated, match="was never set"):
        converted(tmp_path, made, uncalibrated=True)


def test_a_threshold_of_zero_is_one(tmp_path: Path) -> None:
    for norm in ("CROSSCODER", "MIXED"):
        made = foreign.learned(norm=norm)
        made.tensors["threshold"] = torch.tensor(0.0)
        assert_same(converted(tmp_path / norm, made).crosscoder, made, foreign.rows())


def test_latents_without_a_decoder_never_fire_under_mixed(tmp_path: Path) -> None:
    for threshold in (0.0, 1.0):
        made = foreign.learned(norm="MIXED")
        made.tensors["decoder.weight"][:, 5] = 0
        made.tensors["threshold"] = torch.tensor(threshold)
        cc = converted(tmp_path / str(threshold), made).crosscoder
        assert_same(cc, made, foreign.rows())
        assert not (cc.double().encode(foreign.rows().flatten(1)).latents == 5).any()
        assert cc.state_dict()["groups.0.log_threshold"][5] == torch.inf


def test_nan_statistics_mean_that_there_is_no_normaliser(tmp_path: Path) -> None:
    done = converted(tmp_path, foreign.learned())
    assert torch.equal(done.crosscoder.scale, torch.ones(2))
    assert any("all NaN" in line for line in done.assumed)


@pytest.mark.parametrize("name", ["activation_mean", "activation_std"])
@pytest.mark.parametrize("whole", [True, False])
def test_statistics_that_are_partly_nan_are_refused(tmp_path: Path, name: str, whole: bool) -> None:
    made = foreign.learned(normaliser="per_source")
    made.tensors[name][... if whole else (0, 1)] = NAN
    with pytest.raises(FileFormatError, match="partly NaN") as caught:
        converted(tmp_path, made)
    assert f"{name}: {10 if whole else 1} of 10 are NaN" in str(caught.value)


def test_one_scale_for_all_sources_is_spread(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="scalar")
    assert made.tensors["activation_global_scale"].shape == ()
    done = converted(tmp_path, made)
    assert torch.equal(done.crosscoder.scale, made.tensors["activation_global_scale"].expand(2))
    assert any("single number" in line for line in done.assumed)


@pytest.mark.parametrize("scale", [torch.tensor([1.0, 0.0]), torch.tensor([1.0, -2.0])])
def test_scales_that_are_not_positive_are_refused(tmp_path: Path, scale: Tensor) -> None:
    made = foreign.learned(normaliser="per_source")
    made.tensors["activation_global_scale"] = scale
    with pytest.raises(FileFormatError, match="positive scales"):
        converted(tmp_path, made)


def test_a_normaliser_without_its_scale_is_refused(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    del made.tensors["activation_global_scale"]
    with pytest.raises(FileFormatError, match="missing  activation_global_scale"):
        converted(tmp_path, made)


def test_scales_that_do_not_follow_from_the_statistics_are_kept_and_warned_of(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    made.tensors["activation_global_scale"] *= 3
    done = converted(tmp_path, made)
    assert any("do not follow" in line for line in done.warnings)
    assert_same(done.crosscoder, made, foreign.rows())


def test_the_tools_epsilon_counts_where_scales_are_tiny(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    tiny = torch.tensor([2e-6, 1.0])
    for name in ("activation_mean", "activation_std"):
        made.tensors[name][0] /= 2e-6
    made.tensors["activation_global_scale"] = tiny
    x = foreign.rows() * (1 / tiny)[:, None].double()
    done = converted(tmp_path, made)
    assert any("1e-8" in line for line in done.warnings)
    f, y = made.codes(x)
    cc = done.crosscoder.double()
    torch.testing.assert_close(cc.gate, made.code_norm(), rtol=1e-6, atol=0)  # selection does not know of it
    found = cc(x.flatten(1)).view_as(y)
    torch.testing.assert_close(found * tiny[:, None], y * tiny[:, None], rtol=1e-5, atol=1e-5)
    without = torch.einsum("bn,nd->bd", f, made.tensors["decoder.weight"][0].double())
    without = (without + made.tensors["decoder.bias"][0]) / tiny[0] + made.tensors["activation_mean"][0]
    assert not torch.allclose(without * tiny[0], y[:, 0] * tiny[0], rtol=1e-3, atol=1e-3)  # leaving it out would show


def test_the_tensor_of_the_code_norm_wins_over_the_settings(tmp_path: Path) -> None:
    made = foreign.learned(norm="SAE")
    made.settings["code_normalization"] = "crosscoder"
    done = converted(tmp_path, made)
    assert done.crosscoder.nonlinearity == BatchTopK(3, code_norm="concat")
    assert any("code_normalization = CROSSCODER" in line and "SAE" in line for line in done.warnings)
    assert done.crosscoder.provenance["converted"]["warnings"] == list(done.warnings)


def test_an_unknown_code_norm_is_refused(tmp_path: Path) -> None:
    made = foreign.learned()
    made.tensors["code_normalization_id"] = torch.tensor(9)
    with pytest.raises(FileFormatError, match="from 1 to 5; got 9"):
        converted(tmp_path, made)


@pytest.mark.parametrize(("said", "expected"), [(None, "sum"), ("sae", "concat"), ("NONE", "none")])
def test_files_without_the_tensor_have_the_norm_of_their_settings(
    tmp_path: Path, said: str | None, expected: str
) -> None:
    made = foreign.learned(norm={None: "CROSSCODER", "sae": "SAE", "NONE": "NONE"}[said])
    original = foreign.learned(norm={None: "CROSSCODER", "sae": "SAE", "NONE": "NONE"}[said])
    del made.tensors["code_normalization_id"]
    made.settings |= {} if said is None else {"code_normalization": said}
    done = converted(tmp_path, made)
    assert done.crosscoder.nonlinearity == BatchTopK(3, code_norm=expected)
    assert any("code normalisation" in line for line in done.assumed)
    assert_same(done.crosscoder, original, foreign.rows())


def test_settings_of_a_round_trip_lose_against_the_tensors(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    foreign.pretrained_directory(tmp_path, made, k=100, target_rms=1.0, dict_size=99)
    done = convert(tmp_path, sites=SITE)
    assert done.crosscoder.nonlinearity == BatchTopK(3)
    said = "\n".join(done.warnings)
    assert "k = 100, the tensor k 3" in said
    assert "target_rms = 1, the tensor 10" in said
    assert "dict_size = 99, the tensors 12" in said
    assert_same(done.crosscoder, made, foreign.rows())


def test_names_of_compiled_models_are_read(tmp_path: Path) -> None:
    made = foreign.learned(normaliser="per_source")
    foreign.train_directory(tmp_path, made, prefix="_orig_mod.")
    assert_same(convert(tmp_path).crosscoder, made, foreign.rows())


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    made = foreign.learned()
    made.tensors["_orig_mod.encoder.bias"] = torch.zeros(foreign.N)
    with pytest.raises(FileFormatError, match="twice"):
        converted(tmp_path, made)


def test_old_files_have_weights_and_biases_only(tmp_path: Path) -> None:
    made = foreign.learned(top_k=False)
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if name.startswith(("encoder", "decoder"))}
    done = converted(tmp_path, made)
    assert any("before there was one" in line for line in done.assumed)
    assert any("CROSSCODER" in line for line in done.assumed)
    assert_same(done.crosscoder, made, foreign.rows())


@pytest.mark.parametrize("name", ["encoder.bias", "decoder.bias", "decoder.weight", "encoder.weight"])
def test_missing_tensors_are_named_not_made_up(tmp_path: Path, name: str) -> None:
    made = foreign.learned()
    del made.tensors[name]
    with pytest.raises(FileFormatError, match=f"missing  {name}"):
        converted(tmp_path, made)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    made = foreign.learned()
    made.tensors["encoder.bias"] = torch.zeros(foreign.N + 1)
    made.tensors["decoder.weight"] = torch.zeros(foreign.S, foreign.N, foreign.D + 2)
    with pytest.raises(FileFormatError) as caught:
        converted(tmp_path, made)
    assert "shape    encoder.bias: expected (12,), got (13,)" in str(caught.value)
    assert "shape    decoder.weight: expected (2, 12, 5), got (2, 12, 7)" in str(caught.value)


def test_an_sae_of_the_same_tool_is_told_apart(tmp_path: Path) -> None:
    made = foreign.learned()
    made.tensors["encoder.weight"] = torch.zeros(foreign.N, foreign.D)
    with pytest.raises(FileFormatError, match="three axes") as caught:
        converted(tmp_path, made)
    assert "sparse autoencoder" in str(caught.value)


@pytest.mark.parametrize("by", ["id", "threshold"])
def test_decoupled_codes_are_refused_with_the_reason(tmp_path: Path, by: str) -> None:
    made = foreign.learned(norm="DECOUPLED" if by == "id" else "CROSSCODER")
    if by == "threshold":
        made.tensors["threshold"] = torch.tensor([0.5, 0.7])
    with pytest.raises(FileFormatError, match="a code per source") as caught:
        converted(tmp_path, made)
    assert "expected  one code for all sources" in str(caught.value)


def test_a_decoupled_penalty_of_a_relu_does_not_touch_its_code(tmp_path: Path) -> None:
    made = foreign.learned(norm="DECOUPLED", top_k=False)
    assert_same(converted(tmp_path, made).crosscoder, made, foreign.rows())


def test_the_mixture_is_taken_from_the_settings_or_said_to_be_the_default(tmp_path: Path) -> None:
    made = foreign.learned(norm="MIXED")
    assert any("code_normalization_alpha_cc = 0.1" in line for line in converted(tmp_path / "a", made).assumed)
    made.settings |= {"code_normalization_alpha_sae": 0.2, "code_normalization_alpha_cc": 0.9}
    done = converted(tmp_path / "b", made)
    assert not any("alpha" in line for line in done.assumed)
    assert_same(done.crosscoder, made, foreign.rows())


def test_an_encoder_that_reads_some_sources_becomes_such_a_wiring(tmp_path: Path) -> None:
    made = foreign.learned(sources=3, normaliser="per_source")
    made.tensors["encoder.weight"] = made.tensors["encoder.weight"][:2].clone()
    with pytest.raises(FileFormatError, match="reads 2 sources and writes 3"):
        converted(tmp_path / "a", made, models=["a", "b", "c"])
    made.settings["encoder_layers"] = [2, 0]  # in this order
    done = converted(tmp_path / "b", made, models=["a", "b", "c"])
    assert done.crosscoder.reads.models == ("a", "c")
    assert_same(done.crosscoder, made, foreign.rows(sources=3))


def test_a_function_between_encoder_and_decoder_cannot_be_converted(tmp_path: Path) -> None:
    made = foreign.learned()
    made.settings["latent_processor"] = "some_function"
    with pytest.raises(FileFormatError, match="latent_processor"):
        converted(tmp_path, made)


def test_scales_are_not_for_this_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has its own normaliser"):
        converted(tmp_path, foreign.learned(), scales=[1, 1])


def test_k_from_the_settings_where_there_is_no_tensor(tmp_path: Path) -> None:
    made = foreign.learned()
    made.settings["k"] = int(made.tensors.pop("k"))
    assert any("k = 3, from the settings" in line for line in converted(tmp_path / "a", made).assumed)
    del made.settings["k"]
    with pytest.raises(FileFormatError, match="expected k"):
        converted(tmp_path / "b", made)


def test_settings_of_another_class_lose_and_are_warned_of(tmp_path: Path) -> None:
    made = foreign.learned()
    made.settings["dict_class"] = "__import__('os').system('false')"
    done = converted(tmp_path, made)
    assert done.crosscoder.nonlinearity == BatchTopK(3)
    assert any("tensors are of BatchTopKCrossCoder" in line for line in done.warnings)
