"""The files of dictionary_learning's `save_pretrained`: `model.safetensors`, `config.json`, `trainer_config.json`.

Every buffer that its strict loader expects is written, in the shapes of the newest fork (one scale per source). The
statistics only have to give the scale, target / sqrt(Σ_d σ² + 1e-8): σ is the same along a source's width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crosscoder import files
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError
from crosscoder.interop.dense import Dense
from crosscoder.interop.dictionary_learning import CODE_NORMS, OWN_NORMS
from crosscoder.interop.dictionary_learning_normaliser import EPSILON
from crosscoder.nonlinearities import BatchTopK, ReLU


@torch.no_grad()
def write(crosscoder: Crosscoder, weights: Dense, directory: Path) -> list[str]:
    """Write the three files; gives what they do not say."""
    norm = _code_norm(crosscoder)
    tensors = _weights(weights) | _normaliser(weights) | _selection(crosscoder)
    tensors["code_normalization_id"] = torch.tensor({name: number for number, name in CODE_NORMS.items()}[norm])
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    settings = _settings(crosscoder, norm, target=float(tensors["target_rms"]))
    files.write_json(directory / "config.json", settings)
    files.write_json(directory / "trainer_config.json", {"trainer": settings | _trained_on(crosscoder)})
    if not weights.has_normaliser:
        return []
    return ["activation_std holds one number per source, chosen to give the scale; it was not measured"]


def _code_norm(crosscoder: Crosscoder) -> str:
    kind = crosscoder.nonlinearity
    names = {own: name for name, own in OWN_NORMS.items()}
    if isinstance(kind, ReLU):
        return names["sum"]
    if isinstance(kind, BatchTopK) and kind.code_norm in names:
        return names[kind.code_norm]
    raise FileFormatError(
        f"the layout dictionary_learning computes ReLU, and BatchTopK by code norm {', '.join(names)}; not {kind}.",
        hint="Export the BatchTopK crosscoder that it was made from, or share it as it is with crosscoder.save(path).",
    )


def _weights(weights: Dense) -> dict[str, Tensor]:
    scale = weights.scale.double()
    correction = ((scale + EPSILON) / scale if weights.has_normaliser else torch.ones_like(scale))[:, None]
    return {
        "encoder.weight": weights.encoder.float(),
        "encoder.bias": weights.encoder_bias.float(),
        "decoder.weight": (weights.decoder * correction).transpose(0, 1).float(),
        "decoder.bias": (weights.bias * correction).float(),
    }


def _normaliser(weights: Dense) -> dict[str, Tensor]:
    num_sources, width = weights.mean.shape
    if not weights.has_normaliser:
        nan = torch.full((num_sources, width), float("nan"))
        ones = {"activation_global_scale": torch.ones(num_sources), "target_rms": torch.tensor(1.0)}
        return {"activation_mean": nan, "activation_std": nan, **ones}
    target = width**0.5
    std = (target / weights.scale / width**0.5)[:, None].expand(num_sources, width)
    return {
        "activation_mean": weights.mean.float(),
        "activation_std": std.float(),
        "activation_global_scale": weights.scale.float(),
        "target_rms": torch.tensor(target),
    }


def _selection(crosscoder: Crosscoder) -> dict[str, Tensor]:
    kind = crosscoder.nonlinearity
    if not isinstance(kind, BatchTopK):
        return {}
    thresholds = crosscoder.thresholds.unique()
    if len(thresholds) > 1:
        raise FileFormatError(
            "the layout dictionary_learning has one threshold; groups of this crosscoder have their own.",
            details=[f"{group.name}  k = {group.k}" for group in crosscoder.wiring],
            hint="Share it as it is: crosscoder.save(path), crosscoder.push_to_hub(id).",
        )
    return {"k": torch.tensor(kind.k, dtype=torch.int32), "threshold": thresholds[0].float()}


def _settings(crosscoder: Crosscoder, norm: str, *, target: float) -> dict[str, Any]:
    kind, sources = crosscoder.nonlinearity, crosscoder.sources
    settings: dict[str, Any] = {
        "dict_class": "BatchTopKCrossCoder" if isinstance(kind, BatchTopK) else "CrossCoder",
        "activation_dim": sources.widths[0],
        "dict_size": crosscoder.num_latents,
        "num_layers": len(sources),
        "code_normalization": norm,
        "target_rms": target,
    }
    return settings | ({"k": kind.k} if isinstance(kind, BatchTopK) else {})


def _trained_on(crosscoder: Crosscoder) -> dict[str, Any]:
    """What the tool's trainers note: the layer, where it is the residual stream after one; and the models."""
    sites = {source.site for source in crosscoder.sources}
    only = sites.pop().split(".") if len(sites) == 1 else [""]
    layer = {"layer": int(only[1])} if only[-1] == "resid_post" else {}
    return layer | {"lm_name": "-".join(crosscoder.sources.models)}
