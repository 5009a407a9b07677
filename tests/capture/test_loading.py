"""From directories to models: dtypes, adapters, and what is refused with a message that helps."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from capture.families import build, tokens
from crosscoder.capture import ModelConfig, StudiedModel, loading
from crosscoder.capture.fingerprints import weights_hash
from crosscoder.errors import ConfigError, FileFormatError, MissingExtra, ModelNotFound, UnsupportedModel


@pytest.fixture
def copied(toy_base_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_base_path, tmp_path / "copy"))


def load(path: Path, **settings: object) -> StudiedModel:
    return StudiedModel.load("base", ModelConfig(path=str(path), **settings))


def test_a_directory_loads_as_it_was_saved(toy_base_path: Path, toy_model: hf.PreTrainedModel) -> None:
    studied = load(toy_base_path, dtype="float32")
    assert torch.equal(studied.logits(tokens()), toy_model(tokens()).logits)
    assert studied.identity["path"] == str(toy_base_path)
    assert studied.tokenizer.chat_template is not None
    assert studied.source("layers.1.mlp_out").key == "base/layers.1.mlp_out" and studied.width("embed") == 32


@pytest.mark.parametrize("native", [torch.bfloat16, torch.float32])
def test_dtype_on_a_cpu_is_what_it_computes_in(
    toy_base_path: Path, native: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "default_cpu_dtype", lambda: native)
    studied = load(toy_base_path)
    assert studied.dtype == native
    assert studied.identity["dtype"] == str(native).removeprefix("torch.")


def test_dtype_on_a_gpu_is_the_checkpoints() -> None:
    assert loading._dtype(None, hf.LlamaConfig(dtype="float16"), torch.device("cuda")) == torch.float16
    assert loading._dtype("float32", hf.LlamaConfig(dtype="float16"), torch.device("cuda")) == torch.float32


def test_an_encoder_loads_without_a_head(tmp_path: Path, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    build("bert").save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).identity["architecture"] == "BertModel"


def test_a_missing_directory_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=rf"(?s)no/model.*there is none.*{tmp_path}\n.*Correct `path`"):
        load(tmp_path / "no/model")


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no usable model") as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) <= 4


def test_an_unknown_hub_id() -> None:
    with pytest.raises(ModelNotFound, match="Hub id 'nobody/nothing' at revision v1"):
        StudiedModel.load("m", ModelConfig(path="nobody/nothing", revision="v1"))


def test_pickled_weights_are_not_loaded(copied: Path, toy_model: hf.PreTrainedModel) -> None:
    (copied / "model.safetensors").unlink()
    torch.save(toy_model.state_dict(), copied / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="safetensors"):
        load(copied)


def test_truncated_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(FileFormatError, match="cut short"):
        load(copied)


def test_missing_weights(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=r"(?s)lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copied)


def test_an_unknown_device(toy_base_path: Path) -> None:
    with pytest.raises(ConfigError, match="'warp9'"):
        load(toy_base_path, device="warp9")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="extra_forbidden"):
        ModelConfig(path="x", trust_remote_code=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapter_is_the_models_own(toy_base_path: Path, tmp_path: Path, toy_model: hf.PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM.from_pretrained(toy_base_path, dtype=torch.float32)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, settings).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    studied = load(toy_base_path, adapter=str(tmp_path / "adapter"), dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(studied.logits(tokens()), tuned(tokens()).logits)
        assert not torch.allclose(studied.logits(tokens()), toy_model(tokens()).logits)
    assert studied.identity["weights"] != load(toy_base_path, dtype="float32").identity["weights"]
    assert studied.sites() == load(toy_base_path).sites()


def test_a_missing_adapter(toy_base_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelNotFound, match="adapter_config.json"):
        load(toy_base_path, adapter=str(tmp_path / "none"))


def test_an_adapter_that_learns_a_prompt(toy_base_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="adds positions"):
        load(toy_base_path, adapter=str(tmp_path))


def test_an_adapter_without_peft(toy_base_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"crosscoder\[peft\]"):
        load(toy_base_path, adapter="anything")


def test_weights_that_the_files_lack_are_the_same_at_every_loading(tmp_path: Path) -> None:
    """A BERT saved without its pooler: no site needs it, and the hash of the weights is that of the model."""
    small = hf.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    hf.BertModel(small, add_pooling_layer=False).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    hashes = {weights_hash(loading.load_model(ModelConfig(path=str(tmp_path), dtype="float32"))) for _ in range(2)}
    assert len(hashes) == 1 and torch.equal(torch.get_rng_state(), state)
