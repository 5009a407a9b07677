"""From a directory or a Hub id to a model and its tokenizer in memory: safetensors only, and no remote code.

A missing path, a missing file, a truncated file and a missing extra are each one clear error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field

from crosscoder.capture.architectures import FAMILIES
from crosscoder.capture.huggingface import PreTrainedModel, Tokenizer
from crosscoder.errors import ConfigError, FileFormatError, MissingExtra, ModelNotFound, UnsupportedModel

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HEADS = ("pooler", "cls.", "lm_head", "classifier")


class ModelConfig(BaseModel):
    """Which model to study, and how to hold it in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a Hugging Face directory, or the id of a model on the Hub")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub; null is its main branch")
    adapter: str | None = Field(default=None, description="a LoRA adapter to put on the model: directory or Hub id")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="dtype of the weights; null is the checkpoint's own on a GPU, and on a CPU bfloat16 where the "
        "processor computes in it, else float32",
    )
    device: str | None = Field(default=None, description="device of the model; null is the first GPU, else the CPU")


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model that `config` names, with its adapter, on its device."""
    settings = _settings(config)
    device = _device(config.device)
    loader = _loader(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the files lack and no site needs, such as BERT's pooler: one hash at every loading
        model, report = _from_pretrained(
            config,
            loader,
            dtype=_dtype(config.dtype, settings, device),
            use_safetensors=True,
            output_loading_info=True,
        )
    _refuse_missing_weights(config, report["missing_keys"])
    model = model if config.adapter is None else _with_adapter(model, config.adapter)
    return cast(PreTrainedModel, cast(torch.nn.Module, model).to(device))


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The model that `config` names, with its shapes and without its weights."""
    settings = _settings(config)
    with torch.device("meta"):
        return _loader(settings).from_config(settings, trust_remote_code=False)


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The dtype that the model will be held in: the one asked for, or the one derived."""
    return _dtype(config.dtype, _settings(config), _device(config.device))


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer beside the model that `config` names."""
    from transformers import AutoTokenizer

    return cast(Tokenizer, _from_pretrained(config, AutoTokenizer))


def default_cpu_dtype() -> torch.dtype:
    """bfloat16 where this CPU computes in it natively, else float32."""
    native = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage] (there is no public question)
    return torch.bfloat16 if native else torch.float32


def _settings(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    return _from_pretrained(config, AutoConfig)


def _from_pretrained(config: ModelConfig, loader: Any, **settings: Any) -> Any:
    """`loader.from_pretrained` with every failure turned into one of our errors."""
    from safetensors import SafetensorError

    _check_local_path(config.path)
    try:
        return loader.from_pretrained(config.path, revision=config.revision, trust_remote_code=False, **settings)
    except SafetensorError as error:
        raise FileFormatError(
            f"the weights in {config.path} are not whole safetensors files: {error}.",
            hint="They were cut short or are of another format: copy or download them again.",
        ) from error
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from error


def _check_local_path(path: str) -> None:
    """A path that can only be local must exist; anything else may be a Hub id."""
    local = Path(path).expanduser()
    only_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if only_local and not local.is_dir():
        raise ModelNotFound(
            f"expected a model directory at {path}; there is none.",
            details=[f"nearest directory that exists: {_nearest(local)}"],
            hint="Correct `path`, or give the id of a model on the Hub, such as google/gemma-2-2b.",
        )


def _nearest(path: Path) -> Path:
    path = path.absolute()
    return path if path.is_dir() else _nearest(path.parent)


def _not_found(config: ModelConfig, error: Exception) -> ModelNotFound:
    where = "directory" if Path(config.path).is_dir() else "Hub id"
    revision = "" if config.revision is None else f" at revision {config.revision}"
    return ModelNotFound(
        f"no usable model or tokenizer in the {where} {config.path!r}{revision}.",
        details=[f"transformers said: {str(error).strip().splitlines()[0][:300]}"],
        hint="A model needs config.json, *.safetensors and tokenizer files. Check path, network and access rights.",
    )


def _loader(settings: Any) -> Any:
    """The auto class that gives this model its own head: a causal LM, or an encoder without one."""
    from transformers import AutoModel, AutoModelForCausalLM

    family = FAMILIES.get(settings.model_type)
    named = settings.architectures or ()
    causal = any(name.endswith(_CAUSAL_ENDINGS) for name in named)
    encoder = family.encoder if family is not None else bool(named) and not causal
    return AutoModel if encoder else AutoModelForCausalLM


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"expected a device that this machine has; got {name!r}.",
            details=[str(error).strip().splitlines()[0]],
            hint="Use null to choose automatically, or cpu.",
        ) from error


def _dtype(name: str | None, settings: Any, device: torch.device) -> torch.dtype:
    if name is not None:
        return cast(torch.dtype, getattr(torch, name))
    if device.type == "cpu":
        return default_cpu_dtype()
    own = settings.get_text_config().dtype or settings.dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def _refuse_missing_weights(config: ModelConfig, missing: Any) -> None:
    body = sorted(name for name in missing if not any(head in name for head in _HEADS))
    if body:
        raise FileFormatError(
            f"the checkpoint {config.path} lacks {len(body)} of the model's weights.",
            details=[*body[:5], *(["..."] if len(body) > 5 else [])],
            hint="It is incomplete or its config.json is another model's: copy or download it again.",
        )


def _with_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """`model` with LoRA layers in place, not merged: merging would round small updates away in bfloat16."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise MissingExtra(
            f"the adapter {adapter} needs the package peft, which is not installed.",
            hint="Install it: pip install 'crosscoder[peft]'.",
        ) from error
    try:
        settings = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no adapter in the directory or Hub id {adapter!r}.",
            details=[f"peft said: {str(error).strip().splitlines()[0][:300]}"],
            hint="An adapter has adapter_config.json and adapter_model.safetensors. Check `adapter`.",
        ) from error
    if settings.is_prompt_learning:
        raise UnsupportedModel(
            f"the adapter {adapter} learns a prompt ({settings.peft_type}), which adds positions to the text.",
            hint="Use an adapter that changes weights, such as LoRA.",
        )
    return cast(PreTrainedModel, PeftModel.from_pretrained(model, adapter, use_safetensors=True).get_base_model())
