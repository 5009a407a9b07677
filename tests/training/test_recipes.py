"""Recipes: whole run files, whose figures are those of arithmetic at full size, and which train on small models.

Every architecture is built twice without any download: at its real size as a config.json alone, which is all that a dry
run reads, and with as many layers but 16 wide, with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from transformers import PreTrainedTokenizerFast

from capture.texts import dialogue, write_jsonl
from capture.tokenizers_of_kinds import byte_level
from conftest import CHAT_TEMPLATE, toy_texts
from crosscoder.errors import ConfigError, UnknownKey
from crosscoder.training.config import RunConfig
from crosscoder.training.plan import plan
from crosscoder.training.recipes import RECIPES, recipe
from crosscoder.training.run import train

GEMMA_2_2B: dict[str, Any] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000,
}  # fmt: skip
GEMMA_2_9B: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256_000,
}  # fmt: skip
GEMMA_2B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256_000,
}  # fmt: skip
GEMMA_3_1B: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
}  # fmt: skip
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
}  # fmt: skip
QWEN_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
}  # fmt: skip
Kind = tuple[type[Any], type[Any], dict[str, Any]]
GEMMA2 = hf.Gemma2Config, hf.Gemma2ForCausalLM
MODELS: dict[str, Kind] = {
    "google/gemma-2-2b": (*GEMMA2, GEMMA_2_2B),
    "google/gemma-2-2b-it": (*GEMMA2, GEMMA_2_2B),
    "google/gemma-2-9b": (*GEMMA2, GEMMA_2_9B),
    "google/gemma-2-9b-it": (*GEMMA2, GEMMA_2_9B),
    "princeton-nlp/gemma-2-9b-it-SimPO": (*GEMMA2, GEMMA_2_9B),
    "google/gemma-2b": (hf.GemmaConfig, hf.GemmaForCausalLM, GEMMA_2B),
    "google/gemma-3-1b-pt": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, GEMMA_3_1B),
    "meta-llama/Llama-3.1-8B-Instruct": (hf.LlamaConfig, hf.LlamaForCausalLM, LLAMA_8B),
    "Qwen/Qwen3-8B": (hf.Qwen3Config, hf.Qwen3ForCausalLM, QWEN_8B),
}
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# encoder + decoder + biases: latents × (1 + reads + writes) + writes
PARAMETERS = {
    "kissane-gemma-2-2b": 16_384 * (1 + 2 * 4_608) + 4_608,
    "minder-l1-gemma-2-2b": 73_728 * (1 + 2 * 4_608) + 4_608,
    "minder-batch-topk-gemma-2-2b": 73_728 * (1 + 2 * 4_608) + 4_608,
    "boughorbel-9b-pt-it": 114_688 * (1 + 2 * 7_168) + 7_168,
    "boughorbel-9b-pt-simpo": 114_688 * (1 + 2 * 7_168) + 7_168,
    "boughorbel-9b-it-simpo": 114_688 * (1 + 2 * 7_168) + 7_168,
    "lindsey-18-layers": 16_384 * (1 + 2 * 18 * 2_048) + 18 * 2_048,
    # a latent of layer l reads one source of 1,152 and writes 4, 3, 2, 1 of them
    "gemma-scope-2-weakly-causal": 16_384 * (4 + (4 + 4 + 3 + 2 + 1) * 1_152) + 4 * 1_152,
    "jiralerspong-dedicated": 117_964 * (1 + 2 * 8_192) + 2 * 6_554 * (1 + 2 * 4_096) + 8_192,
}


def real_sized(path: str, root: Path) -> Path:
    """A directory with the config.json of the real model and nothing else."""
    kind, model, sizes = MODELS[path]
    directory = root / path.replace("/", "--")
    kind(**sizes, architectures=[model.__name__]).save_pretrained(directory)
    return directory


def small(path: str, root: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model of that architecture and depth, 16 wide, with random weights."""
    kind, model, sizes = MODELS[path]
    directory = root / path.replace("/", "--")
    torch.manual_seed(len(path))
    config = kind(**sizes | SMALL | {"vocab_size": len(tokenizer)})
    model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def overrides_of(name: str, make: Callable[[str], Path]) -> list[str]:
    """The recipe's models, at other paths."""
    return [f"models.{alias}.path={make(config.path)}" for alias, config in recipe(name).run().models.items()]


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_file_is_the_run_that_the_recipe_makes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(recipe(name).text(), encoding="utf-8")
    run = recipe(name).run()
    assert RunConfig.load(file, ["out=null"]) == run
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "Published:" in head[1] and any("Departs from it" in line for line in head)
    assert all(len(line) <= 120 for line in head)
    assert "null" not in yaml.safe_dump(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", RECIPES)
def test_the_dry_run_at_full_size_counts_what_arithmetic_counts(name: str, tmp_path: Path) -> None:
    changed = overrides_of(name, lambda path: real_sized(path, tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text(recipe(name).text(changed), encoding="utf-8")
    run = RunConfig.load(file)
    planned = plan(run)
    assert planned.parameters == PARAMETERS[name]
    assert planned.memory["weights, gradients, Adam"] == 28 * PARAMETERS[name]
    widths = [MODELS[recipe(name).run().models[key.split("/")[0]].path][2]["hidden_size"] for key in run.harvested_keys]
    assert list(planned.sources.values()) == widths
    assert planned.bytes_per_row == 2 * sum(widths) + 13  # bf16; context, position and role of the row
    assert planned.num_steps == run.train.num_tokens // run.train.batch_size
    assert sum(p for p in planned.memory.values()) == planned.memory_total


def test_settings_are_the_published_ones() -> None:
    """What the tables of the papers and their code say, written down a second time."""
    kissane = recipe("kissane-gemma-2-2b").run()
    assert (kissane.train.num_tokens, kissane.train.batch_size, kissane.train.learning_rate) == (
        400_000_000,
        4096,
        5e-5,
    )
    assert kissane.sparsity.model_dump() == {
        "kind": "l1", "coefficient": 2.0, "code_norm": "sum", "warmup_fraction": 0.05
    }  # fmt: skip
    assert kissane.init.decoder_norm == 0.08 and kissane.train.warmup_steps == 1
    topk = recipe("minder-batch-topk-gemma-2-2b").run()
    assert topk.k == 100 and topk.train.k_start == 1024
    assert round(topk.train.k_anneal_fraction * topk.train.num_steps / 100) == 20
    assert topk.losses.aux.model_dump() == {
        "coefficient": 1 / 32, "max_latents": 1152, "dead_after_tokens": 10_000_000
    }  # fmt: skip
    l1 = recipe("minder-l1-gemma-2-2b").run()
    assert l1.sparsity.kind == "l1"
    assert l1.sparsity.coefficient == pytest.approx(4 * (2304 * (1 - 0.846)) ** 0.5 * 0.041, abs=0.05)


def test_the_conversion_of_a_penalty_gives_one_gradient() -> None:
    """λ = 4 √u μ: at error u the gradients of both losses point the same way, for any step in the errors."""
    errors = torch.full((2, 2304), (2304 * 0.154 / 2304) ** 0.5, dtype=torch.float64, requires_grad=True)
    penalty = torch.ones((), dtype=torch.float64, requires_grad=True)
    mu = 0.041
    ours = errors.square().sum() + 4 * (2304 * 0.154) ** 0.5 * mu * penalty
    theirs = errors.norm(dim=1).mean() + mu * penalty
    mine = torch.autograd.grad(ours, (errors, penalty))
    other = torch.autograd.grad(theirs, (errors, penalty))
    ratio = mine[1] / other[1]
    torch.testing.assert_close(mine[0], ratio * other[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_on_small_models_of_its_architecture(
    name: str, tmp_path: Path, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = byte_level(390)
    other.chat_template = CHAT_TEMPLATE
    tokenizers = {"Qwen/Qwen3-8B": other}
    changed = overrides_of(name, lambda path: small(path, tmp_path, tokenizers.get(path, toy_tokenizer)))
    run = recipe(name).run()
    changed += text_of(run, tmp_path) + size_of(run)
    file = tmp_path / "run.yaml"
    file.write_text(recipe(name).text([*changed, f"out={tmp_path / 'run'}"]), encoding="utf-8")
    loaded = RunConfig.load(file)
    planned = plan(loaded)
    result = train(loaded)
    assert sum(p.numel() for p in result.crosscoder.parameters()) == planned.parameters
    assert result.crosscoder.sources.keys == tuple(planned.sources)
    assert (tmp_path / "run" / "crosscoder" / "model.safetensors").exists()
    assert 0 < result.metrics["held_out/l0"] <= result.crosscoder.num_latents


def text_of(run: RunConfig, root: Path) -> list[str]:
    """Local text in the columns that the recipe reads, in short contexts."""
    talk = [dialogue(f"who are you {n}", "a clock, said he", "mend it", "no, said the keeper") for n in range(40)]
    plain = write_jsonl(root / "web.jsonl", "text", toy_texts())
    chat = write_jsonl(root / "chat.jsonl", "conversation", talk)
    changed = ["text.context_length=32", "text.held_out.fraction=0.3", "text.held_out.num_tokens=400"]
    for place, part in enumerate(run.text.mix):
        changed += [f"text.mix.{place}.dataset={chat if part.chat else plain}", f"text.mix.{place}.subset=null"]
    return changed


def size_of(run: RunConfig) -> list[str]:
    """Two steps, and few latents, of the same kind of wiring."""
    changed = [
        "train.num_tokens=128", "train.batch_size=64", "train.warmup_steps=1", "normaliser.num_tokens=128",
        "activations.buffer_gb=0.001", *(f"models.{alias}.dtype=float32" for alias in run.models),
    ]  # fmt: skip
    sizes = {"num_latents": 48, "num_latents_per_layer": 12, "shared": 40}
    fields = type(run.wiring).model_fields
    changed += [f"wiring.{key}={size}" for key, size in sizes.items() if key in fields]
    if "exclusive" in fields:
        changed.append(f"wiring.exclusive={json.dumps(dict.fromkeys(run.models, 4))}")
    if run.k is not None:
        changed += ["nonlinearity.k=6", *(["train.k_start=12"] if run.train.k_start else [])]
    return changed


def test_overrides_are_said_at_the_head_and_checked() -> None:
    text = recipe("kissane-gemma-2-2b").text(["train.learning_rate=1e-4"])
    assert "# Changed here: train.learning_rate=1e-4\n" in text
    assert yaml.safe_load(text)["train"]["learning_rate"] == 1e-4
    with pytest.raises(
        UnknownKey, match=r"the recipe kissane-gemma-2-2b has 1 problem.*\n.*did you mean train.batch_size"
    ):
        recipe("kissane-gemma-2-2b").text(["train.batch_sise=1"])


def test_a_name_that_no_recipe_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean kissane-gemma-2-2b") as caught:
        recipe("kissane")
    assert "lindsey-18-layers" in str(caught.value)
