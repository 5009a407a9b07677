"""Our crosscoders in other tools' layouts: those tools compute the same, and reading them back gives the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crosscoder import wiring as wirings
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError, NotCalibrated
from crosscoder.interop import convert, export
from crosscoder.nonlinearities import BatchTopK, JumpReLU, Nonlinearity, ReLU, TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import LatentGroup, Wiring
from interop import foreign

D, N = foreign.D, foreign.N
PAIR = SourceSet([Source("base", "layers.3.resid_post", D), Source("chat", "layers.3.resid_post", D)])
NORMS: list[Nonlinearity] = [ReLU(), *(BatchTopK(3, code_norm=norm) for norm in ("sum", "concat", "none"))]


def made(kind: Nonlinearity, wiring: Wiring | None = None, *, threshold: float = 1.0, seed: int = 0) -> Crosscoder:
    """A crosscoder whose biases, normaliser and threshold are not trivial."""
    cc = Crosscoder(wiring or wirings.acausal(PAIR, num_latents=N), kind, seed=seed)
    g = foreign.draws(seed)
    with torch.no_grad():
        for parameter in cc.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=g)
        cc.set_normaliser(torch.randn(cc.sources.width, generator=g), torch.tensor([0.4, 1.3]))
        cc.refresh_gate()
        for weights in cc.weights:
            weights.threshold.fill_(threshold if isinstance(kind, BatchTopK) else float("nan"))
    return cc.eval()


def assert_same(codes: Tensor, reconstructions: Tensor, cc: Crosscoder, x: Tensor) -> None:
    cc = cc.double()
    code = cc.encode(x.flatten(1))
    assert 0.1 < (codes > 0).double().mean() < 0.8
    torch.testing.assert_close(code.to_dense(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cc.decode(code), reconstructions.flatten(1), rtol=1e-5, atol=1e-5)


def as_learned(directory: Path) -> foreign.Learned:
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return foreign.Learned(load_file(directory / "model.safetensors"), settings)


@pytest.mark.parametrize("kind", NORMS, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
def test_dictionary_learning_computes_the_same(tmp_path: Path, kind: Nonlinearity, normalised: bool) -> None:
    cc, x = made(kind), foreign.rows()
    if not normalised:
        cc.set_normaliser(torch.zeros(2 * D), torch.ones(2))
    done = export(cc, tmp_path / "out", layout="dictionary_learning")
    theirs = as_learned(done.path)
    assert (theirs.normaliser() is not None) == normalised
    assert_same(*theirs.codes(x), cc, x)
    again = convert(done.path)
    assert again.warnings == ()
    assert again.crosscoder.nonlinearity == kind
    assert again.crosscoder.sources.keys == PAIR.keys
    assert_same(*theirs.codes(x), again.crosscoder, x)
    torch.testing.assert_close(again.crosscoder.scale, cc.scale.double())
    torch.testing.assert_close(again.crosscoder.decoder_norms(), cc.decoder_norms(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NORMS, ids=str)
def test_every_tensor_of_the_strict_loader_is_written(tmp_path: Path, kind: Nonlinearity) -> None:
    tensors = as_learned(export(made(kind), tmp_path / "out", layout="dictionary_learning").path).tensors
    expected = foreign.learned(top_k=isinstance(kind, BatchTopK)).tensors
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


def test_statistics_give_the_scale_by_the_tools_own_formula(tmp_path: Path) -> None:
    tensors = as_learned(export(made(ReLU()), tmp_path / "out", layout="dictionary_learning").path).tensors
    scale = tensors["target_rms"] / torch.sqrt(tensors["activation_std"].square().sum(1) + 1e-8)
    torch.testing.assert_close(scale, tensors["activation_global_scale"])


def test_the_tools_epsilon_is_made_up_for(tmp_path: Path) -> None:
    cc = made(ReLU())
    tiny = torch.tensor([2e-6, 1.0])
    cc.set_normaliser(torch.zeros(2 * D), tiny)
    x = foreign.rows() / tiny.double()[:, None]
    _, y = as_learned(export(cc, tmp_path / "out", layout="dictionary_learning").path).codes(x)
    mine = cc.double()(x.flatten(1)).view_as(y)
    torch.testing.assert_close(mine * tiny[:, None], y * tiny[:, None], rtol=1e-5, atol=1e-5)


def test_ckkissane_computes_the_same_with_the_mean_in_the_biases(tmp_path: Path) -> None:
    cc, x = made(ReLU()), foreign.rows()
    done = export(cc, tmp_path / "out", layout="ckkissane")
    tensors = torch.load(done.path / "cc_weights.pt", weights_only=True)
    assert_same(*foreign.kissane_codes(tensors, x, cc.scale), cc, x)
    settings = json.loads((done.path / "cfg.json").read_text(encoding="utf-8"))
    assert {"dict_size", "d_in", "enc_dtype", "seed", "dec_init_norm", "device"} <= set(settings)
    assert settings["hook_point"] == "blocks.3.hook_resid_post"
    again = convert(done.path)  # its scales are in the settings
    assert again.crosscoder.sources.keys == PAIR.keys
    assert_same(*foreign.kissane_codes(tensors, x, cc.scale), again.crosscoder, x)


@pytest.mark.parametrize("norm", ["CROSSCODER", "SAE", "NONE"])
def test_what_was_read_can_be_written_again(tmp_path: Path, norm: str) -> None:
    theirs, x = foreign.learned(norm=norm, normaliser="per_source"), foreign.rows()
    foreign.train_directory(tmp_path / "in", theirs)
    export(convert(tmp_path / "in").crosscoder, tmp_path / "out", layout="dictionary_learning")
    back = as_learned(tmp_path / "out")
    for name in ("encoder.weight", "decoder.weight", "decoder.bias", "threshold", "activation_global_scale"):
        torch.testing.assert_close(back.tensors[name], theirs.tensors[name], rtol=1e-6, atol=1e-6)
    for mine, their in zip(back.codes(x), theirs.codes(x), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


def test_groups_become_zeros_and_that_is_said(tmp_path: Path) -> None:
    wiring = wirings.dedicated(PAIR, shared=6, exclusive={"base": 3, "chat": 3})
    cc, x = made(BatchTopK(3), wiring), foreign.rows()
    done = export(cc, tmp_path / "out", layout="dictionary_learning")
    theirs = as_learned(done.path)
    assert not theirs.tensors["decoder.weight"][1, 6:9].any()
    assert_same(*theirs.codes(x), cc, x)
    said = "\n".join(done.remarks)
    assert "shared 0–5, base 6–8, chat 9–11" in said
    assert "zeros" in said


def test_tied_decoders_are_written_out(tmp_path: Path) -> None:
    group = LatentGroup("all", N, PAIR.keys, PAIR.keys, tied="decoder")
    cc, x = made(ReLU(), Wiring(PAIR, [group])), foreign.rows()
    theirs = as_learned(export(cc, tmp_path / "out", layout="dictionary_learning").path)
    assert torch.equal(theirs.tensors["activation_mean"][0], cc.mean[:D])
    assert_same(*theirs.codes(x), cc, x)


def unequal() -> Crosscoder:
    return Crosscoder(
        wirings.acausal(SourceSet([Source("a", "embed", 4), Source("b", "embed", 5)]), num_latents=8), ReLU()
    )


def transcoder() -> Crosscoder:
    return Crosscoder(
        wirings.transcoder(Source("a", "layers.0.mlp_in", 4), Source("a", "layers.0.mlp_out", 4), num_latents=8), ReLU()
    )


@pytest.mark.parametrize(
    ("cc", "layout", "message"),
    [
        (unequal(), "dictionary_learning", r"different widths: \[4, 5\]"),
        (transcoder(), "ckkissane", "read and not written: a/layers.0.mlp_in"),
        (made(ReLU()).folded(), "ckkissane", "folded into the weights"),
        (made(TopK(3)), "dictionary_learning", "computes ReLU, and BatchTopK"),
        (made(JumpReLU()), "dictionary_learning", "computes ReLU, and BatchTopK"),
        (made(BatchTopK(3, code_norm="max")), "dictionary_learning", "code norm sum, concat, none"),
        (made(BatchTopK(3)), "ckkissane", "computes ReLU; this crosscoder has batch_topk"),
    ],
    ids=["widths", "transcoder", "folded", "topk", "jumprelu", "max", "batch_topk"],
)
def test_what_a_layout_cannot_compute_is_refused_and_nothing_is_left(
    tmp_path: Path, cc: Crosscoder, layout: Any, message: str
) -> None:
    with pytest.raises(FileFormatError, match=message):
        export(cc, tmp_path / "out", layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_threshold_of_ones_own_per_group_is_refused(tmp_path: Path) -> None:
    wiring = wirings.dedicated(PAIR, shared=6, exclusive={"base": 3, "chat": 3})
    cc = made(BatchTopK(3), wiring)
    cc.weights[1].threshold.fill_(0.1)
    with pytest.raises(FileFormatError, match="has one threshold"):
        export(cc, tmp_path / "out", layout="dictionary_learning")


def test_an_uncalibrated_crosscoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotCalibrated):
        export(made(BatchTopK(3), threshold=float("nan")), tmp_path / "out", layout="dictionary_learning")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    for path in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(FileFormatError, match="is there already"):
            export(made(ReLU()), path, layout="ckkissane")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "mine"
