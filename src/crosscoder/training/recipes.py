"""Recipes: complete run files for published set-ups. `crosscoder recipes` prints them.

A recipe is a function that returns a whole RunConfig, named for what it reproduces; how it departs from what was
published, and why, heads the file as comments. Penalties are converted into the units of our loss,

    Σ_s ‖x̃_s − x̂̃_s‖² + λ Σ_i f_i Σ_s ‖d_i^s‖        with E‖x̃_s‖² = the mean width d, for every source

Sums of squares without ½ and with E‖x_s‖ = √d (Kissane et al.) keep their λ. dictionary_learning's trainers minimise
`mean over sources of ‖e_s‖`, not squared, + μ Σ_i f_i Σ_s ‖d_i^s‖. With two sources and u = E‖e_s‖² = d · (1 − FVE) its
gradient is that of the squares divided by 4 √u, so that λ = 4 √(d (1 − FVE)) μ at a given FVE.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from crosscoder.capture import ModelConfig
from crosscoder.capture.text import DatasetConfig, TextConfig
from crosscoder.errors import ConfigError
from crosscoder.training import runfile
from crosscoder.training.config import (
    AcausalConfig,
    AuxConfig,
    BatchTopKConfig,
    InitConfig,
    L1Sparsity,
    LiveActivations,
    LossesConfig,
    ReLUConfig,
    RunConfig,
    TrainConfig,
)
from crosscoder.training.wiring_config import DedicatedConfig, WeaklyCausalConfig

_WIDTH = 110
FINEWEB = DatasetConfig(dataset="HuggingFaceFW/fineweb", subset="sample-10BT", column="text", weight=0.5)
LMSYS = DatasetConfig(dataset="lmsys/lmsys-chat-1m", column="conversation", chat=True, weight=0.5)
PILE = DatasetConfig(dataset="monology/pile-uncopyrighted", column="text", weight=0.5)
NO_AUX = LossesConfig(aux=AuxConfig(coefficient=0.0))


@dataclass(frozen=True)
class Recipe:
    """A published set-up: what it is, where it is published, how the run file departs from it, and the run."""

    name: str
    title: str
    source: str
    departures: tuple[str, ...]
    run: Callable[[], RunConfig]

    @property
    def file_name(self) -> str:
        """What the run file is called where nobody says otherwise."""
        return f"{self.name}.yaml"

    def text(self, overrides: Sequence[str] = ()) -> str:
        """The run file, with `key.path=value` applied and said so at its head; raises as `RunConfig.load` does."""
        run = with_overrides(self.run(), overrides, name=f"the recipe {self.name}")
        changed = [f"Changed here: {', '.join(overrides)}"] if overrides else []
        head = [self.title, f"Published: {self.source}", "Departs from it:"]
        lines = [*_comment(head), *_comment([f"- {d}" for d in self.departures], indent="  "), *_comment(changed)]
        return "\n".join(lines) + "\n" + as_yaml(run)


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises ConfigError with the nearest one."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    raise ConfigError(
        f"no recipe is called {name!r}.",
        details=list(RECIPES),
        hint=f"Did you mean {near[0]}?" if near else "`crosscoder recipes` lists them with what they are.",
    )


def as_yaml(run: RunConfig) -> str:
    """A run as YAML, every key that has a value; what is null is left to be derived."""
    content = _without_nulls(run.model_dump(mode="json"))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def with_overrides(run: RunConfig, overrides: Sequence[str], *, name: str) -> RunConfig:
    """The run with `key.path=value` applied; `name` is its name in errors."""
    raw = runfile.override(run.model_dump(mode="json"), overrides, schema=RunConfig)
    return runfile.validate(RunConfig, raw, name=name)


def kissane_gemma_2_2b() -> RunConfig:
    """Kissane et al. 2024: Gemma-2-2B base and chat, 16,384 latents, L1."""
    return RunConfig(
        models=_pair("google/gemma-2-2b", "google/gemma-2-2b-it"),
        sources=("base/layers.14.resid_pre", "chat/layers.14.resid_pre"),
        text=_text(PILE, LMSYS),
        activations=LiveActivations(buffer_gb=4.8),
        wiring=AcausalConfig(num_latents=2**14),
        nonlinearity=ReLUConfig(),
        sparsity=L1Sparsity(coefficient=2.0, code_norm="sum", warmup_fraction=0.05),
        losses=NO_AUX,
        init=InitConfig(decoder_norm=0.08, across_sources="independent"),
        train=TrainConfig(
            num_tokens=400_000_000,
            batch_size=4096,
            learning_rate=5e-5,
            warmup_steps=1,
            decay_fraction=0.2,
            gradient_clip=1.0,
        ),
    )


def minder_l1_gemma_2_2b() -> RunConfig:
    """Minder et al. 2025: Gemma-2-2B base and chat, 73,728 latents, L1 with μ = 0.041."""
    return RunConfig(
        models=_pair("google/gemma-2-2b", "google/gemma-2-2b-it"),
        sources=_both("layers.13.resid_post"),
        text=_text(FINEWEB, LMSYS),
        wiring=AcausalConfig(num_latents=32 * 2304),
        nonlinearity=ReLUConfig(),
        sparsity=L1Sparsity(coefficient=3.1, code_norm="sum", warmup_fraction=0.0),
        losses=NO_AUX,
        init=InitConfig(decoder_norm=0.005, across_sources="same"),
        train=_minder_train(),
    )


def minder_batch_topk_gemma_2_2b() -> RunConfig:
    """Minder et al. 2025: the same with BatchTopK, k = 100 annealed from 1,024."""
    return _minder_batch_topk("google/gemma-2-2b", "google/gemma-2-2b-it", site="layers.13.resid_post", width=2304)


def boughorbel_pt_it() -> RunConfig:
    """Boughorbel et al. 2025: Gemma-2-9B and its instruction-tuned version."""
    return _minder_batch_topk("google/gemma-2-9b", "google/gemma-2-9b-it", site="layers.20.resid_post", width=3584)


def boughorbel_pt_simpo() -> RunConfig:
    """Boughorbel et al. 2025: Gemma-2-9B and the version tuned with SimPO."""
    simpo = "princeton-nlp/gemma-2-9b-it-SimPO"
    return _minder_batch_topk("google/gemma-2-9b", simpo, site="layers.20.resid_post", width=3584)


def boughorbel_it_simpo() -> RunConfig:
    """Boughorbel et al. 2025: the instruction-tuned version and the one tuned with SimPO."""
    simpo = "princeton-nlp/gemma-2-9b-it-SimPO"
    return _minder_batch_topk("google/gemma-2-9b-it", simpo, site="layers.20.resid_post", width=3584)


def lindsey_18_layers() -> RunConfig:
    """Lindsey et al. 2024, cross-layer features: one acausal crosscoder of all 18 residual streams of Gemma-2B."""
    return RunConfig(
        models={"base": ModelConfig(path="google/gemma-2b", dtype="bfloat16")},
        sources=tuple(f"base/layers.{layer}.resid_post" for layer in range(18)),
        text=_text(FINEWEB.model_copy(update={"weight": 1.0}), tokenizer="base"),
        activations=LiveActivations(buffer_gb=8.0),
        wiring=AcausalConfig(num_latents=2**14),
        nonlinearity=ReLUConfig(),
        sparsity=L1Sparsity(coefficient=2.0, code_norm="sum", warmup_fraction=0.05),
        losses=NO_AUX,
        init=InitConfig(decoder_norm=0.005, across_sources="independent"),
        train=TrainConfig(
            num_tokens=400_000_000, batch_size=2048, learning_rate=2e-5, warmup_steps=9766, decay_fraction=0.2
        ),
    )


def gemma_scope_2_weakly_causal() -> RunConfig:
    """Gemma Scope 2: a weakly causal crosscoder of four layers of Gemma-3-1B, 65,536 latents."""
    return RunConfig(
        models={"base": ModelConfig(path="google/gemma-3-1b-pt", dtype="bfloat16")},
        sources=tuple(f"base/layers.{layer}.resid_post" for layer in (7, 13, 17, 22)),
        text=_text(FINEWEB.model_copy(update={"weight": 1.0}), tokenizer="base"),
        wiring=WeaklyCausalConfig(num_latents_per_layer=2**14, reads="own"),
        nonlinearity=BatchTopKConfig(k=50),
        train=TrainConfig(num_tokens=400_000_000, batch_size=4096, learning_rate=7e-5),
    )


def jiralerspong_dedicated() -> RunConfig:
    """Jiralerspong & Bricken 2026: dedicated latents between Llama-3.1-8B and Qwen3-8B, 131,072 in all."""
    return RunConfig(
        models={
            "llama": ModelConfig(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
            "qwen": ModelConfig(path="Qwen/Qwen3-8B", dtype="bfloat16"),
        },
        sources=("llama/layers.16.resid_post", "qwen/layers.18.resid_post"),
        text=TextConfig(
            tokenizer="llama", context_length=1024, packing="document", alignment="bytes", mix=(FINEWEB, LMSYS)
        ),
        wiring=DedicatedConfig(shared=131_072 - 2 * 6_554, exclusive={"llama": 6_554, "qwen": 6_554}),
        nonlinearity=BatchTopKConfig(k=200, code_norm="sum"),
        losses=LossesConfig(aux=AuxConfig(coefficient=0.03, max_latents=512, dead_after_tokens=10_000_000)),
        init=InitConfig(decoder_norm=0.4),
        train=TrainConfig(
            num_tokens=100_000 * 2048,
            batch_size=2048,
            learning_rate=1e-4,
            warmup_steps=1000,
            decay_fraction=0.0,
            k_start=1000,
            k_anneal_fraction=0.05,
        ),
    )


def _minder_batch_topk(base: str, chat: str, *, site: str, width: int) -> RunConfig:
    return RunConfig(
        models=_pair(base, chat),
        sources=_both(site),
        text=_text(FINEWEB, LMSYS),
        wiring=AcausalConfig(num_latents=32 * width),
        nonlinearity=BatchTopKConfig(k=100, code_norm="sum"),
        losses=LossesConfig(
            aux=AuxConfig(coefficient=1 / 32, max_latents=width // 2, dead_after_tokens=10_000_000),
        ),
        init=InitConfig(decoder_norm=1.0, across_sources="same"),
        train=_minder_train().model_copy(update={"k_start": 1024, "k_anneal_fraction": 0.041}),
    )


def _minder_train() -> TrainConfig:
    return TrainConfig(
        num_tokens=100_000_000,
        batch_size=2048,
        learning_rate=1e-4,
        warmup_steps=1000,
        decay_fraction=0.0,
        gradient_clip=1.0,
    )


def _pair(base: str, chat: str) -> dict[str, ModelConfig]:
    return {alias: ModelConfig(path=path, dtype="bfloat16") for alias, path in (("base", base), ("chat", chat))}


def _both(site: str) -> tuple[str, str]:
    return f"base/{site}", f"chat/{site}"


def _text(*mix: DatasetConfig, tokenizer: str = "chat") -> TextConfig:
    return TextConfig(tokenizer=tokenizer, context_length=1024, mix=mix)


def _without_nulls(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items() if value is not None}
    return [_without_nulls(value) for value in content] if isinstance(content, list) else content


def _comment(texts: Sequence[str], indent: str = "") -> list[str]:
    return [
        line
        for text in texts
        for line in textwrap.wrap(text, _WIDTH, initial_indent=f"# {indent}", subsequent_indent=f"# {indent}  ")
    ]


_CENTRED = "every source is centred and scaled to one mean square, fitted on 1 million training tokens"
_LIVE = "activations are computed while training and shuffled in a buffer; nothing is stored on disk"
_DICTIONARY_LEARNING = (
    "the published trainer minimises the mean of the unsquared errors ‖e_s‖; here the squares are summed, as the paper "
    "writes them",
    f"{_CENTRED}; published: raw activations, and a bias that starts at their geometric median",
    "the 100 million tokens are one pass over newly drawn text; the published code goes twice over a stored set",
    "text: FineWeb and LMSYS-Chat-1M as their owners give them, dialogues in the chat model's template; no BOS",
    _LIVE,
)
_BATCH_TOPK = (
    *_DICTIONARY_LEARNING,
    "AuxK adds 1/32 of its squared error, which the published one divides by the variance of the residual; and it "
    "takes at most 512 dead latents a step, in turn",
    "the threshold for inference follows the lowest kept score over about ten batches; published: over a thousand",
    "k falls from 1,024 to 100 in the first 4.1 % of the run: 2,000 steps",
)
_BOUGHORBEL = (
    "layer, size and k could not be looked up: layer 20 of 42, 32 latents per dimension (114,688) and k = 100 are a "
    "choice, by the proportions of Minder et al.; so is all that is said of the published trainer below",
    *_BATCH_TOPK,
)


def _recipes(*recipes: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({each.name: each for each in recipes})


RECIPES = _recipes(
    Recipe(
        "kissane-gemma-2-2b",
        "Gemma-2-2B base and chat, residual stream before layer 14, 16,384 latents, L1 (Kissane et al. 2024).",
        "https://www.lesswrong.com/posts/srt6JXsRMtmqAJavD and github.com/ckkissane/crosscoder-model-diff-replication",
        (
            "the loss is the same sum of squares without ½, so that the coefficient 2 stays; published scales make the "
            f"mean norm √d, here {_CENTRED}",
            "text: the published mix is tokens of the Pile and LMSYS-Chat-1M; here both are read as text, the Pile "
            "without its copyrighted parts, dialogues in the chat model's template",
            _LIVE,
        ),
        kissane_gemma_2_2b,
    ),
    Recipe(
        "minder-l1-gemma-2-2b",
        "Gemma-2-2B base and chat, layer 13, 73,728 latents, L1 (Minder et al. 2025).",
        "https://arxiv.org/abs/2504.02922 and github.com/science-of-finetuning/sparsity-artifacts-crosscoders",
        (
            "μ = 0.041 of the published loss becomes 4 √(d (1 − FVE)) μ = 4 √(2304 · 0.154) · 0.041 = 3.1 here, at the "
            "published FVE of 0.846: a place to start from; compare L0 and FVE, then adjust",
            *_DICTIONARY_LEARNING,
            "gradients longer than 1 are scaled down; the published L1 trainer does not",
        ),
        minder_l1_gemma_2_2b,
    ),
    Recipe(
        "minder-batch-topk-gemma-2-2b",
        "Gemma-2-2B base and chat, layer 13, 73,728 latents, BatchTopK with k = 100 (Minder et al. 2025).",
        "https://arxiv.org/abs/2504.02922 and github.com/science-of-finetuning/sparsity-artifacts-crosscoders",
        _BATCH_TOPK,
        minder_batch_topk_gemma_2_2b,
    ),
    Recipe(
        "boughorbel-9b-pt-it",
        "Gemma-2-9B and its instruction-tuned version, BatchTopK (Boughorbel et al. 2025).",
        "https://arxiv.org/abs/2509.18792",
        _BOUGHORBEL,
        boughorbel_pt_it,
    ),
    Recipe(
        "boughorbel-9b-pt-simpo",
        "Gemma-2-9B and the version tuned with SimPO, BatchTopK (Boughorbel et al. 2025).",
        "https://arxiv.org/abs/2509.18792",
        _BOUGHORBEL,
        boughorbel_pt_simpo,
    ),
    Recipe(
        "boughorbel-9b-it-simpo",
        "Gemma-2-9B instruction-tuned and tuned with SimPO, BatchTopK (Boughorbel et al. 2025).",
        "https://arxiv.org/abs/2509.18792",
        ("published: no decoder norm tells the two apart; each was diffed against pt instead", *_BOUGHORBEL),
        boughorbel_it_simpo,
    ),
    Recipe(
        "lindsey-18-layers",
        "One acausal crosscoder of all 18 residual streams of Gemma-2B, L1 of norms (Lindsey et al. 2024).",
        "https://transformer-circuits.pub/2024/crosscoders/index.html",
        (
            "the published 18-layer model is not public: Gemma-2B has as many layers",
            "published sizes go from 2^13 to 2^21 latents: 2^14 here",
            "coefficient, learning rate, batch, tokens and initial norm are not published: those of the open "
            "cross-layer crosscoder of GPT-2 (github.com/neelnanda-io/Crosscoders), with 5 % of warm-up",
            f"{_CENTRED}; published: each layer is normalised",
            "text: FineWeb",
        ),
        lindsey_18_layers,
    ),
    Recipe(
        "gemma-scope-2-weakly-causal",
        "A weakly causal crosscoder of four layers of Gemma-3-1B, 65,536 latents (after Gemma Scope 2).",
        "Gemma Scope 2, https://www.greaterwrong.com/posts/YQro5LyYjDzZrBCdb",
        (
            "BatchTopK with k = 50 in place of JumpReLU with a quadratic penalty around L0 = 50 and one on frequency",
            "layers 7, 13, 17 and 22 of 26 are 25, 50, 65 and 85 % of the depth; 16,384 latents begin at each",
            "no Matryoshka prefixes, no warm start from autoencoders, Adam's β₁ = 0.9 in place of 0",
            "400 million tokens of FineWeb: number and mix are a choice",
        ),
        gemma_scope_2_weakly_causal,
    ),
    Recipe(
        "jiralerspong-dedicated",
        "Dedicated latents between Llama-3.1-8B and Qwen3-8B, 131,072 latents (Jiralerspong & Bricken 2026).",
        "https://arxiv.org/abs/2602.11729",
        (
            "the layers of this pair could not be looked up: the middle ones are a choice (16 of 32, 18 of 36), and so "
            "is the instruction-tuned Llama, whose chat template renders the dialogues",
            "tokens are paired where both end at the same byte of the text, not by windows of decoded text",
            f"{_CENTRED}; published: the median norm is scaled, and tokens beyond twice the median are left out",
            "AuxK is not divided by the variance of the residual",
            "each dialogue and document is a context of its own",
        ),
        jiralerspong_dedicated,
    ),
)
