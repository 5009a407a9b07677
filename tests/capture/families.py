"""Tiny random-weight models of every family, built without any download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf

VOCABULARY = 400
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in _SIZES.items() if key not in names} | more


_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NO_GROUPS = ("num_key_value_heads", "head_dim")

BUILDERS: Mapping[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SIZES, sliding_window=4)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SIZES, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_without("head_dim"))),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_without("head_dim"))),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_without("head_dim"))),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_without(*_NO_GROUPS))),
    "gpt_neox_sequential": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_without(*_NO_GROUPS), use_parallel_residual=False)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_without("head_dim"), **_EXPERTS, shared_expert_intermediate_size=16)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_SIZES, **_EXPERTS)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_without(*_NO_GROUPS)), add_pooling_layer=False),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_SIZES)),
    "olmo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**_without("head_dim"))),
    "olmo3": lambda: hf.Olmo3ForCausalLM(hf.Olmo3Config(**_without("head_dim"), sliding_window=4)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_without("head_dim"), num_experts=4, num_experts_per_tok=2)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_without("head_dim"))),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_without(*_NO_GROUPS)), add_pooling_layer=False),
}
ENCODERS = ("bert", "roberta")
PARALLEL = ("gpt_neox",)
FAMILIES = tuple(BUILDERS)
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS)


FLOAT32_ONLY = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Their fused experts have no double-precision kernel."""


def build(name: str) -> hf.PreTrainedModel:
    """The tiny model of a family, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDERS[name]()
        return model.to(torch.float32 if name in FLOAT32_ONLY else torch.float64).eval()


def tokens(batch: int = 2, positions: int = 7) -> torch.Tensor:
    """Token ids that are neither special nor all alike."""
    return 3 + (torch.arange(batch * positions) * 53 % (VOCABULARY - 3)).view(batch, positions)
