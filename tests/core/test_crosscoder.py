"""The Crosscoder against independent arithmetic: an SAE written here, folding, blocks, permutations, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.crosscoder_files import without_local_paths
from crosscoder.errors import FileFormatError, NotCalibrated, SourceMismatch
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, ReLU, TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import LatentGroup, Wiring, acausal, sae

A, B, C = Source("base", "embed", 6), Source("chat", "embed", 9), Source("chat", "layers.0.mlp_out", 5)
SOURCES = SourceSet([A, B, C])
KINDS: list[Nonlinearity] = [ReLU(), TopK(3), BatchTopK(3)]


def mixed_wiring() -> Wiring:
    """Blocks that overlap, a transcoder among them, and one that reads what no group writes first."""
    return Wiring(
        SOURCES,
        [
            LatentGroup("shared", 13, SOURCES.keys, SOURCES.keys),
            LatentGroup("across", 7, (A.key,), (C.key,)),
            LatentGroup("own", 5, (B.key,), (B.key,)),
        ],
    )


def crosscoder(wiring: Wiring, kind: Nonlinearity, *, seed: int = 0) -> Crosscoder:
    """A crosscoder in fp64 with a normaliser, biases and a threshold that are not trivial."""
    cc = Crosscoder(wiring, kind, seed=seed).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in cc.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        cc.set_normaliser(
            torch.randn(wiring.sources.width, generator=g).double(),
            torch.tensor([4.0, 40.0, 0.5][: len(wiring.sources)]).double(),
        )
        cc.refresh_gate()
        for weights in cc.weights:
            weights.threshold.fill_(0.7)
    return cc


def rows(wiring: Wiring, n: int = 50) -> Tensor:
    return torch.randn(n, wiring.sources.width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def dense_forward(cc: Crosscoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction from masked full matrices: the definition, sharing no code with the implementation."""
    scale = torch.cat([cc.scale[i].expand(s.width) for i, s in enumerate(cc.sources)])
    normalised = (x - cc.mean) * scale
    pre, decoders = [], torch.zeros(cc.num_latents, cc.sources.width, dtype=x.dtype)
    first = 0
    for group, weights in zip(cc.wiring, cc.weights, strict=True):
        read, write = (list(cc.sources.columns(keys)) for keys in (group.reads, group.writes))
        pre.append(normalised[:, read] @ weights.encoder.T + weights.encoder_bias)
        decoders[first : first + group.num_latents, write] = weights.decoder
        first += group.num_latents
    p = torch.cat(pre, 1)
    norms = sum(decoders[:, s].norm(dim=1) for s in cc.sources.slices.values())
    score = p * norms
    if isinstance(cc.nonlinearity, ReLU):
        kept = p > 0
    elif isinstance(cc.nonlinearity, TopK):
        cut = score.topk(cc.nonlinearity.k, dim=1).values[:, -1:]
        kept = (score >= cut) & (score > 0)
    elif cc.training:
        cut = score.flatten().sort(descending=True).values[cc.nonlinearity.k * x.shape[0] - 1]
        kept = (score >= cut) & (score > 0)
    else:
        kept = score > 0.7
    f = p * kept
    return f, ((f @ decoders + cc.bias) / scale) + cc.mean


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [mixed_wiring, lambda: acausal(SOURCES, num_latents=21)], ids=["mixed", "acausal"])
def test_blocked_storage_equals_masked_dense_matrices(kind: Nonlinearity, training: bool, make: object) -> None:
    wiring = make()  # pyright: ignore[reportCallIssue]
    cc = crosscoder(wiring, kind).train(training)
    x = rows(wiring)
    f, xh = dense_forward(cc, x)
    code = cc.encode(x)
    torch.testing.assert_close(code.to_dense(), f)
    torch.testing.assert_close(cc.decode(code), xh)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_gradients_of_blocks_equal_those_of_masked_dense_matrices(kind: Nonlinearity) -> None:
    wiring = mixed_wiring()
    cc, x = crosscoder(wiring, kind).train(), rows(wiring)
    leaf = x.clone().requires_grad_()
    (x - cc(leaf)).pow(2).sum().backward()
    gradients = [p.grad.clone() for p in cc.parameters() if p.grad is not None] + [leaf.grad]
    cc.zero_grad()
    twin = x.clone().requires_grad_()
    (x - dense_forward(cc, twin)[1]).pow(2).sum().backward()
    expected = [p.grad for p in cc.parameters()] + [twin.grad]
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_source_is_a_batch_top_k_sae() -> None:
    """Forward, loss and gradients of an SAE written from its formula alone."""
    cc = crosscoder(sae(A, num_latents=20), BatchTopK(3)).train()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = [p.detach().clone().requires_grad_() for p in (cc.weights[0].encoder, cc.weights[0].encoder_bias)]
    d, b = (p.detach().clone().requires_grad_() for p in (cc.weights[0].decoder, cc.bias))
    xn = (x - cc.mean) * 4.0
    pre = torch.relu(xn @ w[0].T + w[1])
    score = pre * d.detach().norm(dim=1)
    f = pre * (score >= score.flatten().topk(3 * 40).values[-1])
    loss = (xn - (f @ d + b)).pow(2).sum(1).mean()
    loss.backward()
    mine = (cc.normalise(x) - cc.decode_normalised(cc.encode_normalised(cc.normalise(x)))).pow(2).sum(1).mean()
    mine.backward()
    torch.testing.assert_close(mine, loss)
    pairs = zip(
        [*w, d, b], [cc.weights[0].encoder, cc.weights[0].encoder_bias, cc.weights[0].decoder, cc.bias], strict=True
    )
    for theirs, parameter in pairs:
        torch.testing.assert_close(parameter.grad, theirs.grad)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_folding_is_exact_with_unequal_scales_and_keeps_selection_and_norms(kind: Nonlinearity) -> None:
    wiring = mixed_wiring()
    cc, x = crosscoder(wiring, kind).eval(), rows(wiring, 200)
    folded = cc.folded()
    assert not torch.equal(folded.weights[0].encoder, cc.weights[0].encoder)
    torch.testing.assert_close(folded.encode(x).to_dense(), cc.encode(x).to_dense())
    torch.testing.assert_close(folded(x), cc(x))
    for space in ("normalised", "raw"):
        torch.testing.assert_close(folded.decoder_norms(space), cc.decoder_norms(space))
        torch.testing.assert_close(folded.decoder_rows(B.key, space), cc.decoder_rows(B.key, space))


def test_folding_in_single_precision_stays_within_a_hundred_thousandth() -> None:
    cc = crosscoder(acausal(SOURCES, num_latents=64), BatchTopK(8)).float().eval()
    x = rows(cc.wiring, 400).float()
    with torch.no_grad():
        y, folded = cc(x), cc.folded()(x)
    assert float((folded - y).norm() / y.norm()) < 1e-5


def test_decoder_norms_by_hand_in_both_spaces() -> None:
    cc = Crosscoder(acausal(SourceSet([A, B]), num_latents=2), TopK(1))
    with torch.no_grad():
        cc.weights[0].decoder.zero_()
        cc.weights[0].decoder[0, 0] = 3.0
        cc.weights[0].decoder[0, 6:8] = torch.tensor([3.0, 4.0])
        cc.scale.copy_(torch.tensor([4.0, 40.0]))
    assert cc.decoder_norms().tolist() == [[3.0, 5.0], [0.0, 0.0]]
    torch.testing.assert_close(cc.decoder_norms("raw")[0], torch.tensor([0.75, 0.125]))


def test_rescaling_a_latent_changes_nothing() -> None:
    cc, x = crosscoder(mixed_wiring(), BatchTopK(3)).train(), rows(mixed_wiring())
    before = cc(x)
    with torch.no_grad():
        for weights in cc.weights:
            factor = torch.rand(weights.encoder.shape[0], 1, dtype=torch.float64) + 0.5
            weights.encoder.mul_(factor)
            weights.encoder_bias.mul_(factor[:, 0])
            weights.decoder.div_(factor)
    cc.refresh_gate()
    torch.testing.assert_close(cc(x), before)


def test_permuting_sources_with_their_parameters_permutes_the_reconstruction() -> None:
    two, swapped = SourceSet([A, B]), SourceSet([B, A])
    cc, other = (crosscoder(acausal(s, num_latents=12), BatchTopK(2)).train() for s in (two, swapped))
    turn = list(range(6, 15)) + list(range(6))
    with torch.no_grad():
        for mine, theirs in ((cc.weights[0].encoder, other.weights[0].encoder),
                             (cc.weights[0].decoder, other.weights[0].decoder)):  # fmt: skip
            theirs.copy_(mine[:, turn])
        other.weights[0].encoder_bias.copy_(cc.weights[0].encoder_bias)
        other.bias.copy_(cc.bias[turn])
        other.set_normaliser(cc.mean[turn], cc.scale.flip(0))
        other.refresh_gate()
    x = rows(cc.wiring)
    torch.testing.assert_close(other(x[:, turn]), cc(x)[:, turn])


def test_training_keeps_exactly_k_per_row_and_calibration_carries_it_over() -> None:
    cc = crosscoder(acausal(SOURCES, num_latents=60), BatchTopK(4))
    x = rows(cc.wiring, 30_000)
    assert cc.train().encode(x[:3000]).num_active == 4 * 3000
    cc.calibrate(x[:20_000].split(500))
    assert cc.eval().encode(x[:20_000]).num_active == 4 * 20_000
    assert abs(cc.eval().encode(x[20_000:]).l0 - 4) < 0.2


def test_eval_mode_without_a_threshold_says_what_to_do() -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=8), BatchTopK(2)).eval()
    with pytest.raises(NotCalibrated, match="calibrate"):
        cc.encode(torch.zeros(1, 20))


def test_wrong_width_names_the_sources() -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=8), TopK(2))
    with pytest.raises(SourceMismatch, match=r"20 columns; got shape \(3, 4\)"):
        cc.encode(torch.zeros(3, 4))


def test_initial_weights_depend_on_seed_and_group_only_and_grow_by_appending() -> None:
    small, large = (Crosscoder(acausal(SOURCES, num_latents=n), TopK(1), seed=3) for n in (1100, 2500))
    assert torch.equal(small.weights[0].encoder, large.weights[0].encoder[:1100])
    assert not torch.equal(small.weights[0].encoder, Crosscoder(small.wiring, TopK(1), seed=4).weights[0].encoder)
    torch.testing.assert_close(small.decoder_norms(), torch.full((1100, 3), 0.3))
    assert torch.equal(small.weights[0].encoder, small.weights[0].decoder)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_saved_and_loaded_is_the_same_function(kind: Nonlinearity, tmp_path: Path) -> None:
    cc = crosscoder(mixed_wiring(), kind).float().eval()
    cc.provenance = {"models": {"base": {"path": "owner/name"}}, "text": "a <b> & c"}
    for original in (cc, cc.folded()):
        original.save(tmp_path / "cc")
        again = Crosscoder.load(tmp_path / "cc")
        assert again.wiring == cc.wiring
        assert again.nonlinearity == kind
        assert again.provenance == cc.provenance
        assert not again.training
        x = rows(cc.wiring).float()
        assert torch.equal(again(x), original(x))
        assert torch.equal(again.decoder_norms(), original.decoder_norms())
    assert sorted(p.name for p in (tmp_path / "cc").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["cc"]


def saved(tmp_path: Path) -> Path:
    return Crosscoder(mixed_wiring(), TopK(2)).save(tmp_path / "cc")


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        Crosscoder.load(path)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    for found, message in (("crosscoder.crosscoder/2", "newer"), ("other/1", "not a crosscoder"), (None, "not a")):
        (path / "config.json").write_text(json.dumps({**config, "format": found}))
        with pytest.raises(FileFormatError, match=message):
            Crosscoder.load(path)
    (path / "config.json").write_text(json.dumps({**config, "surprise": 1}))
    with pytest.raises(FileFormatError, match="surprise"):
        Crosscoder.load(path)


def test_tensors_of_another_crosscoder_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    other = Crosscoder(acausal(SOURCES, num_latents=3), TopK(1)).save(tmp_path / "other")
    (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(FileFormatError, match=r"missing  groups\.shared\.encoder"):
        Crosscoder.load(path)


def test_a_path_that_is_neither_here_nor_a_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="owner/name"):
        Crosscoder.load(tmp_path / "nothing")


def test_saving_never_replaces_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileFormatError, match=r"thesis\.tex"):
        Crosscoder(mixed_wiring(), TopK(2)).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_is_published_holds_no_local_path() -> None:
    made = {"models": {"base": {"path": "/srv/models/base", "revision": None}}, "text": ["/data/x.parquet", "a/b"]}
    expected = {"models": {"base": {"path": "base", "revision": None}}, "text": ["x.parquet", "a/b"]}
    assert without_local_paths(made) == expected


def test_the_model_card_loads_as_one_and_holds_no_local_path(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    cc = Crosscoder(mixed_wiring(), BatchTopK(2))
    cc.provenance = {"models": {"base": {"path": "/secret/place"}, "chat": {"path": "google/gemma-2-2b"}}}
    cc.save(tmp_path / "cc")
    card = ModelCard.load(tmp_path / "cc" / "README.md")
    assert card.data.base_model == ["google/gemma-2-2b"]
    assert "/secret/place" not in card.content
