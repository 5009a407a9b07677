"""Whether two models descend from one another: fine-tunes, independent starts, adapters, other shapes."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from crosscoder.capture.ancestry import Ancestry, measure_ancestry
from crosscoder.capture.models import StudiedModel
from crosscoder.errors import ConfigError

from ..conftest import build_toy_model


def studied(alias: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> StudiedModel:
    """The model under that alias."""
    return StudiedModel(alias, model, tokenizer)


def test_a_fine_tune_is_of_one_ancestry_and_an_independent_start_is_not(
    toy_model: PreTrainedModel, toy_partner: PreTrainedModel, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The median cosine of matrices, against one computed here; norms, which are alike everywhere, do not count."""
    base, chat = studied("base", toy_model, toy_tokenizer), studied("chat", toy_partner, toy_tokenizer)
    other = studied("other", build_toy_model(seed=9), toy_tokenizer)
    tuned, foreign = measure_ancestry(base, chat), measure_ancestry(base, other)
    matrices = {name: w for name, w in toy_model.named_parameters() if w.ndim > 1}
    partner = dict(toy_partner.named_parameters())
    cosines = [float(torch.cosine_similarity(w.flatten(), partner[n].flatten(), dim=0)) for n, w in matrices.items()]
    assert min(cosines) <= tuned.cosine <= max(cosines) and tuned.cosine > 0.6
    assert (tuned.shared, tuned.reason, tuned.num_tensors) == (True, None, len(matrices))
    assert abs(foreign.cosine) < 0.05 and foreign.comparable == 1.0
    assert not foreign.shared and foreign.reason is not None and "cosine of their weights" in foreign.reason
    assert measure_ancestry(base, base).cosine == pytest.approx(1.0)


def test_other_shapes_have_no_counterpart(toy_model: PreTrainedModel, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """Where most weights have no counterpart there is nothing to measure; a deeper copy still is comparable."""
    base = studied("base", toy_model, toy_tokenizer)
    wide = measure_ancestry(base, studied("wide", build_toy_model(seed=0, width=64), toy_tokenizer))
    assert wide.comparable == 0.0 and math.isnan(wide.cosine) and not wide.shared
    assert wide.reason is not None and "0% of the weights" in wide.reason
    assert wide.to_json()["cosine"] is None
    deep = build_toy_model(seed=1, num_layers=3)
    deep.load_state_dict(toy_model.state_dict(), strict=False)
    assert measure_ancestry(base, studied("deep", deep, toy_tokenizer)).shared


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_sits_on_its_ancestor(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """LoRA layers in place rename what they sit on; merged ones are weights like any other."""
    peft = pytest.importorskip("peft")
    base = studied("base", build_toy_model(seed=0), toy_tokenizer)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(build_toy_model(seed=0), settings).eval()
    in_place = measure_ancestry(base, studied("lora", tuned.get_base_model(), toy_tokenizer))
    assert in_place.comparable == 1.0 and in_place.cosine == pytest.approx(1.0) and in_place.shared
    assert in_place.num_tensors == measure_ancestry(base, base).num_tensors
    merged = measure_ancestry(base, studied("merged", tuned.merge_and_unload(), toy_tokenizer))
    assert merged.comparable == 1.0 and merged.shared


def test_an_ancestry_is_of_two_models() -> None:
    """It can be asked for in either order, and for no other pair."""
    found = Ancestry("base", "chat", cosine=0.9, comparable=1.0, num_tensors=3)
    assert found.between("chat", "base") is found
    with pytest.raises(ConfigError, match="expected the ancestry of base and plain"):
        found.between("base", "plain")


def test_a_vocabulary_that_was_added_to_is_no_other_ancestry(
    toy_model: PreTrainedModel, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A fine-tune with a few more embeddings: the rows that both have are compared."""
    grown = deepcopy(toy_model)
    grown.resize_token_embeddings(toy_model.config.vocab_size + 8)
    found = measure_ancestry(studied("base", toy_model, toy_tokenizer), studied("chat", grown, toy_tokenizer))
    assert found.shared and found.comparable > 0.99 and found.cosine == pytest.approx(1.0)
