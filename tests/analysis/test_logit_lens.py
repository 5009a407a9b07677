"""The logit lens against norm and head written out, and tokens as text."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from crosscoder.analysis.logit_lens import logit_lens
from crosscoder.analysis.tokens import token_pieces
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import UnsupportedSite
from crosscoder.nonlinearities import TopK
from crosscoder.sources import SourceSet
from crosscoder.wiring import acausal

SITE = "layers.0.resid_post"


def crosscoder_of(model: StudiedModel, site: str = SITE) -> Crosscoder:
    """Random decoder rows at one site, with a scale that is not one."""
    cc = Crosscoder(acausal(SourceSet([model.source(site)]), num_latents=6), TopK(2))
    cc.set_normaliser(torch.zeros(32), torch.tensor([0.01]))
    return cc


@torch.no_grad()
def test_rms_norm_and_head_by_hand(toy_model: PreTrainedModel, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """The promoted tokens are the largest entries of head · (weight ⊙ d / rms(d))."""
    model = StudiedModel("base", toy_model, toy_tokenizer)
    cc = crosscoder_of(model)
    found = logit_lens(cc, model, source="base", latents=[4, 1], num_tokens=5)
    d = cc.decoder_rows(f"base/{SITE}", "raw")[[4, 1]].double()
    normed = d / d.square().mean(1, keepdim=True).sqrt() * toy_model.model.norm.weight.double()
    wanted = (normed @ toy_model.lm_head.weight.double().T).topk(5, dim=1)
    assert found.token_ids.tolist() == wanted.indices.tolist()
    torch.testing.assert_close(found.weight.double(), wanted.values, rtol=1e-3, atol=1e-3)
    pieces = found.pieces(toy_tokenizer)
    assert list(pieces) == [4, 1] and pieces[4][0] == toy_tokenizer.decode([found.token_ids[0, 0]])
    assert found.table(toy_tokenizer).num_rows == 2


@torch.no_grad()
def test_biases_of_the_final_norm_promote_nothing(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """With a LayerNorm, its bias (here enormous) is not part of what a direction says."""
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(config).eval()
    gpt.transformer.ln_f.bias.copy_(100 * torch.randn(32))
    model = StudiedModel("base", gpt, toy_tokenizer)
    cc = crosscoder_of(model)
    found = logit_lens(cc, model, source="base", latents=[0], num_tokens=3)
    d = cc.decoder_rows(f"base/{SITE}", "raw")[0]
    centred = d - d.mean()
    logits = (centred / centred.square().mean().sqrt()) @ gpt.lm_head.weight.T
    assert found.token_ids[0].tolist() == logits.topk(3).indices.tolist()


def test_what_never_enters_the_residual_stream_has_no_lens(
    toy_model: PreTrainedModel, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The input of an MLP comes after its norm: its directions do not reach the head."""
    model = StudiedModel("base", toy_model, toy_tokenizer)
    with pytest.raises(UnsupportedSite, match="not in the residual stream"):
        logit_lens(crosscoder_of(model, "layers.0.mlp_in"), model, source="base", latents=[0])


def test_pieces_put_together_are_the_text(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """Spaces belong to the tokens that carry them."""
    ids = toy_tokenizer("the old house  stood", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(toy_tokenizer, ids)
    assert "".join(pieces[token] for token in ids) == "the old house  stood"
