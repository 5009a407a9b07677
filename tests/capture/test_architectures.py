"""Every site of every family, against equations written here and the model's own hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import Tensor

from capture.families import DECODERS, ENCODERS, FAMILIES, PARALLEL, build, tokens
from crosscoder.capture import StudiedModel, architectures
from crosscoder.capture.architectures import FAMILIES as TABLE
from crosscoder.capture.architectures import Tap
from crosscoder.errors import UnsupportedModel, UnsupportedSite

NORM_BEFORE_MLP = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
    "olmo2": None,
    "olmo3": None,
    "bert": None,
    "roberta": None,
}
BRANCHES = ("attn_out", "mlp_out")
_studied: dict[str, StudiedModel] = {}


def studied(name: str, tokenizer: hf.PreTrainedTokenizerFast) -> StudiedModel:
    if name not in _studied:
        _studied[name] = StudiedModel("m", build(name), tokenizer)
    return _studied[name]


def everything(model: StudiedModel) -> dict[str, Tensor]:
    return model.read(model.sites(), tokens())


def outcome(model: StudiedModel) -> Tensor:
    """The logits, or the last residual stream of an encoder."""
    if model.architecture.family.encoder:
        return model.read([model.sites()[-1]], tokens())[model.sites()[-1]]
    return model.logits(tokens())


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_residual_stream_is_the_models_hidden_states(name: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = studied(name, toy_tokenizer)
    hidden = model.model(tokens(), output_hidden_states=True).hidden_states
    seen = everything(model)
    assert torch.equal(seen["embed"], hidden[0])
    for layer in range(model.num_layers - 1):
        assert torch.equal(seen[f"layers.{layer}.resid_post"], hidden[layer + 1])
    last = seen[f"layers.{model.num_layers - 1}.resid_post"]
    norm = model.architecture.final_norm
    assert_equal(last if norm is None else norm(last), hidden[-1])
    if norm is not None:
        assert not torch.allclose(last, hidden[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_branches_are_what_is_added(name: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = studied(name, toy_tokenizer)
    seen = everything(model)
    for layer, block in enumerate(model.architecture.blocks):
        at = {kind: seen.get(f"layers.{layer}.{kind}") for kind in ("resid_mid", "resid_post", "mlp_in", *BRANCHES)}
        pre = seen["embed"] if layer == 0 else seen[f"layers.{layer - 1}.resid_post"]
        if name in ENCODERS:
            assert_equal(block.attention.output.LayerNorm(pre + at["attn_out"]), at["resid_mid"])
            assert_equal(block.output.LayerNorm(at["resid_mid"] + at["mlp_out"]), at["resid_post"])
        elif name in PARALLEL:
            assert at["resid_mid"] is None
            assert_equal(pre + at["attn_out"] + at["mlp_out"], at["resid_post"])
        else:
            assert_equal(pre + at["attn_out"], at["resid_mid"])
            assert_equal(at["resid_mid"] + at["mlp_out"], at["resid_post"])
        norm = NORM_BEFORE_MLP.get(name, "post_attention_layernorm")
        before = pre if name in PARALLEL else at["resid_mid"]
        assert_equal(before if norm is None else block.get_submodule(norm)(before), at["mlp_in"])


@pytest.mark.parametrize("name", FAMILIES)
def test_replacing_by_itself_changes_nothing(name: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = studied(name, toy_tokenizer)
    clean = outcome(model)
    for site in model.sites():
        with model.replace(site, lambda x, _: x):
            assert torch.equal(outcome(model), clean), site


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_put_in_is_what_flows_on(name: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = studied(name, toy_tokenizer)
    clean = outcome(model)
    new = torch.linspace(-3, 3, model.width("embed")).to(model.dtype).expand(2, 7, -1)
    for site in [site for site in model.sites() if site == "embed" or site.startswith("layers.1.")]:
        with model.replace(site, lambda x, _: new):
            seen = everything(model)
            assert torch.equal(seen[site], new), site
            assert not torch.allclose(outcome(model), clean), site
        pre, post = seen["layers.0.resid_post"], seen["layers.1.resid_post"]
        if name not in (*ENCODERS, *PARALLEL) and site != "layers.1.resid_post":
            middle = seen["layers.1.resid_mid"]
            assert_equal(middle if site == "layers.1.resid_mid" else pre + seen["layers.1.attn_out"], middle)
            assert_equal(middle + seen["layers.1.mlp_out"], post)
    assert torch.equal(outcome(model), clean)


@pytest.mark.parametrize("name", DECODERS)
def test_unembedding_the_last_stream_gives_the_logits(name: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = studied(name, toy_tokenizer)
    last = model.sites()[-1]
    assert_equal(model.unembed(model.read([last], tokens())[last]), model.logits(tokens()))


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_the_right_changes_nothing(name: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = studied(name, toy_tokenizer)
    site = model.sites()[-1]
    ids = tokens()
    alone = model.read([site], ids[:1, :4])[site]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    assert_equal(model.read([site], ids, attention_mask=mask)[site][:1, :4], alone)


def test_parallel_blocks_have_no_middle(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedSite, match=r"(?s)layers.1.resid_mid.*parallel"):
        studied("gpt_neox", toy_tokenizer).read(["layers.1.resid_mid"], tokens())


def test_a_missing_layer_names_what_there_is(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UnsupportedSite, match=r"(?s)3 layers.*layers\.9\.mlp_out.*layers\.0 to 2: mlp_out.*Did you mean"
    ):
        studied("llama", toy_tokenizer).source("layers.9.mlp_out")


@pytest.mark.parametrize(
    ("kind", "tap"),
    [("attn_out", Tap("mlp")), ("mlp_out", Tap("self_attn")), ("resid_mid", Tap("input_layernorm", "input"))],
)
def test_selfcheck_refuses_a_wrong_table(
    kind: str, tap: Tap, toy_tokenizer: hf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(TABLE["llama"], taps={**TABLE["llama"].taps, kind: tap})
    monkeypatch.setattr(architectures, "FAMILIES", {**TABLE, "llama": wrong})
    with pytest.raises(UnsupportedModel, match="not the sum of its parts"):
        StudiedModel("m", build("llama"), toy_tokenizer)


def test_selfcheck_refuses_unknown_scaling_of_logits(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = build("llama")
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 2))
    with pytest.raises(UnsupportedModel, match="do not give its logits"):
        StudiedModel("m", model, toy_tokenizer)


def test_unknown_architecture_has_the_stream_only(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    config = hf.OPTConfig(
        vocab_size=400, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    )
    model = StudiedModel("m", hf.OPTForCausalLM(config).eval(), toy_tokenizer)
    assert model.sites() == ("embed", *(f"layers.{layer}.resid_post" for layer in range(3)))
    hidden = model.model(tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(model.read(["layers.1.resid_post"], tokens())["layers.1.resid_post"], hidden[2])
    with pytest.raises(UnsupportedSite, match=r"layers\.1\.mlp_out"):
        model.read(["layers.1.mlp_out"], tokens())
    with pytest.raises(UnsupportedSite, match="unembed"):
        model.unembed(hidden[2])


def test_encoder_decoders_are_refused(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    config = hf.T5Config(vocab_size=400, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(UnsupportedModel, match="encoder and a decoder"):
        StudiedModel("m", hf.T5ForConditionalGeneration(config), toy_tokenizer)
