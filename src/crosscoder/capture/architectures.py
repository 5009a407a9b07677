"""Where each site lies in each architecture: a module, and its input or output.

Sites are named by *meaning*. With the residual stream `r`, a sequential pre-norm block computes

    resid_mid  = resid_pre + attn_out
    mlp_in     = norm(resid_mid)              (what the MLP module receives)
    resid_post = resid_mid + mlp_out

`attn_out` and `mlp_out` are what is *added*: where a family norms its branches before adding them (Gemma 2, OLMo 2),
they are the outputs of those norms. A parallel block adds both branches to resid_pre and has no resid_mid. A post-norm
block (BERT) has resid_mid = LN(resid_pre + attn_out), resid_post = LN(resid_mid + mlp_out). `embed` is whatever enters
block 0: after Gemma's scaling, GPT-2's positions, BERT's LayerNorm.

Unknown architectures get `embed` and `layers.N.resid_post` by structure alone. Nothing here is trusted: `selfcheck`
proves these equations on every model that is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from torch import nn

from crosscoder.capture.huggingface import PreTrainedModel
from crosscoder.errors import UnsupportedModel, UnsupportedSite
from crosscoder.sources import SITE_KINDS, canonical_site

Residual = Literal["sequential", "parallel", "post_norm", "unknown"]


@dataclass(frozen=True)
class Tap:
    """A place in a block: the input or output of the module at a path below it.

    `shared`: the module's input is also the residual branch (`residual = h; h = norm(h)`), so that a new value has to
    be written into that very tensor to reach both.
    """

    module: str
    side: Literal["input", "output"] = "output"
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` have in common."""

    blocks: str
    taps: Mapping[str, Tap]
    final_norm: str | None
    residual: Residual = "sequential"
    encoder: bool = False
    post_norms: tuple[str, str] | None = None


@dataclass(frozen=True)
class BoundTap:
    """A tap of one particular model."""

    module: nn.Module
    side: Literal["input", "output"]
    shared: bool = False


@dataclass(frozen=True)
class Architecture:
    """The sites of one particular model."""

    name: str
    family: Family
    blocks: nn.ModuleList = field(repr=False)
    stem: nn.Module = field(repr=False)
    final_norm: nn.Module | None = field(repr=False)

    @property
    def num_layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def sites(self) -> tuple[str, ...]:
        """Every site the model has, in the order of the forward pass."""
        kinds = [kind for kind in SITE_KINDS if kind == "resid_post" or kind in self.family.taps]
        return ("embed", *(f"layers.{layer}.{kind}" for layer in range(self.num_layers) for kind in kinds))

    def tap(self, site: str) -> BoundTap:
        """Where `site` lies; raises UnsupportedSite when the model lacks it."""
        site = canonical_site(site)
        if site not in self.sites():
            raise self._lacks(site)
        if site == "embed":
            return BoundTap(self.blocks[0], "input")
        _, layer, kind = site.split(".")
        tap = self.family.taps.get(kind, Tap(""))
        return BoundTap(self.blocks[int(layer)].get_submodule(tap.module), tap.side, tap.shared)

    def _lacks(self, site: str) -> UnsupportedSite:
        near = difflib.get_close_matches(site, self.sites(), n=1)
        details = [f"it has  {line}" for line in ("embed", *self._kinds())]
        if site.endswith("resid_mid") and self.family.residual == "parallel":
            details.append(
                "its blocks are parallel: attention and MLP both read resid_pre, so nothing lies between them"
            )
        return UnsupportedSite(
            f"expected a site of this {self.name} model with {self.num_layers} layers; got {site!r}.",
            details=details,
            hint=f"Did you mean {near[0]}?" if near else "Name one of these.",
        )

    def _kinds(self) -> Iterator[str]:
        last = f"layers.{self.num_layers - 1}."
        for site in self.sites():
            if site.startswith(last):
                yield f"layers.0 to {self.num_layers - 1}: {site.removeprefix(last)}"


_LLAMA = Family(
    blocks="layers",
    taps={
        "attn_out": Tap("self_attn"),
        "resid_mid": Tap("post_attention_layernorm", "input", shared=True),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("mlp"),
    },
    final_norm="norm",
)
_GEMMA2 = replace(
    _LLAMA,
    taps={
        "attn_out": Tap("post_attention_layernorm"),
        "resid_mid": Tap("pre_feedforward_layernorm", "input", shared=True),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("post_feedforward_layernorm"),
    },
)
_OLMO2 = replace(
    _LLAMA,
    taps={
        "attn_out": Tap("post_attention_layernorm"),
        "resid_mid": Tap("mlp", "input", shared=True),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("post_feedforward_layernorm"),
    },
)
_PHI3 = replace(
    _LLAMA,
    taps={**_LLAMA.taps, "attn_out": Tap("resid_attn_dropout"), "mlp_out": Tap("resid_mlp_dropout")},
)
_GPT2 = Family(
    blocks="h",
    taps={
        "attn_out": Tap("attn"),
        "resid_mid": Tap("ln_2", "input", shared=True),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("mlp"),
    },
    final_norm="ln_f",
)
_NEOX = Family(
    blocks="layers",
    taps={
        "attn_out": Tap("post_attention_dropout"),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("post_mlp_dropout"),
    },
    final_norm="final_layer_norm",
    residual="parallel",
)
_NEOX_SEQUENTIAL = replace(
    _NEOX,
    taps={**_NEOX.taps, "resid_mid": Tap("post_attention_layernorm", "input", shared=True)},
    residual="sequential",
)
_BERT = Family(
    blocks="encoder.layer",
    taps={
        "attn_out": Tap("attention.output.dense"),
        "resid_mid": Tap("attention.output"),
        "mlp_in": Tap("intermediate", "input"),
        "mlp_out": Tap("output.dense"),
    },
    final_norm=None,
    residual="post_norm",
    encoder=True,
    post_norms=("attention.output.LayerNorm", "output.LayerNorm"),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "llama",
                "mistral",
                "mixtral",
                "qwen2",
                "qwen3",
                "qwen2_moe",
                "qwen3_moe",
                "gemma",
                "olmo",
                "olmoe",
                "smollm3",
            ),
            _LLAMA,
        ),
        **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _GEMMA2),
        **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
        "phi3": _PHI3,
        "gpt2": _GPT2,
        "gpt_neox": _NEOX,
        **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    }
)
"""Families by the `model_type` of their config."""


def family_of(model: PreTrainedModel) -> Family | None:
    """The table's entry for `model`, or None when its architecture is not in the table."""
    if model.config.model_type == "gpt_neox" and not model.config.use_parallel_residual:
        return _NEOX_SEQUENTIAL
    return FAMILIES.get(model.config.model_type)


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Finds the blocks of `model` and binds its family's taps to them."""
    family = family_of(model)
    name = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"expected one stack of blocks; {name} has an encoder and a decoder.",
            hint="Study a causal language model or an encoder.",
        )
    if family is None:
        return _by_structure(model, name)
    found = _named_blocks(model, family)
    if found is None:
        raise UnsupportedModel(
            f"expected the blocks of a {name} model under {family.blocks!r}; this {type(model).__name__} has none.",
            details=[f"every block should have  {tap.module}" for tap in family.taps.values()],
            hint="The installed transformers lays this model out in another way: try another transformers version.",
        )
    stem = model.get_submodule(found.rpartition(".")[0])
    norm = None if family.final_norm is None else stem.get_submodule(family.final_norm)
    return Architecture(name, family, _module_list(model, found), stem, norm)


def _named_blocks(model: nn.Module, family: Family) -> str | None:
    for path, module in model.named_modules():
        fits = isinstance(module, nn.ModuleList) and f".{path}".endswith(f".{family.blocks}") and len(module) > 0
        if fits and all(_has(next(module.children()), tap.module) for tap in family.taps.values()):
            return path
    return None


def _has(block: nn.Module, path: str) -> bool:
    return path in dict(block.named_modules())


def _module_list(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _by_structure(model: PreTrainedModel, name: str) -> Architecture:
    """The largest list of identical modules, as many as the config has layers, is taken for the blocks."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (sum(weight.numel() for weight in module.parameters()), path)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UnsupportedModel(
            f"the architecture {name!r} is not in the table, and no list of {wanted} identical blocks was found in it.",
            details=[f"known architectures: {', '.join(sorted(FAMILIES))}"],
            hint="Study a model of a known architecture, or add this one to crosscoder/capture/architectures.py.",
        )
    path = max(lists)[1]
    family = Family(blocks=path, taps={}, final_norm=None, residual="unknown")
    return Architecture(name, family, _module_list(model, path), model.get_submodule(path.rpartition(".")[0]), None)
