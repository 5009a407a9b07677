"""Tiny crosscoders of other tools: files in each historical layout, and what those tools compute from them.

The arithmetic is written from the published formulas, in fp64, over the files' own tensors; it shares no code with the
package. Einsum letters: b rows, s sources, d width, n latents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

S, D, N = 2, 5, 12
NORMS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}
NAN = float("nan")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*, num_rows: int = 64, sources: int = S, seed: int = 9) -> Tensor:
    """Raw activations (rows, sources, width): unequal sizes, means that are not zero."""
    x = torch.randn(num_rows, sources, D, generator=draws(seed), dtype=torch.float64)
    sizes = torch.tensor([3.0, 0.7, 1.9, 5.0])[:sources].double()
    return x * sizes[:, None] + torch.linspace(-2, 2, sources * D).reshape(sources, D).double()


# -- ckkissane ------------------------------------------------------------------------------------------------------


def kissane(*, sources: int = S, seed: int = 0) -> dict[str, Tensor]:
    g = draws(seed)
    return {
        "W_enc": torch.randn(sources, D, N, generator=g),
        "W_dec": torch.randn(N, sources, D, generator=g),
        "b_enc": torch.randn(N, generator=g),
        "b_dec": torch.randn(sources, D, generator=g),
    }


def kissane_settings(**changes: Any) -> dict[str, Any]:
    return {
        "seed": 49,
        "d_in": D,
        "dict_size": N,
        "enc_dtype": "fp32",
        "model_name": "gemma-2-2b",
        "site": "resid_pre",
        "device": "cuda:7",  # not a device of this machine: whoever uses it fails
        "hook_point": "blocks.14.hook_resid_pre",
        "dec_init_norm": 0.08,
        "wandb_entity": "somebody",
        **changes,
    }


def kissane_files(directory: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None, *, hub: bool) -> Path:
    """Local (`3.pt`, `3_cfg.json`) or Hub (`cc_weights.pt`, `cfg.json`) names; gives the weights' path."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / ("cc_weights.pt" if hub else "3.pt")
    torch.save(tensors, weights)
    if settings is not None:
        (directory / ("cfg.json" if hub else "3_cfg.json")).write_text(json.dumps(settings), encoding="utf-8")
    return weights


def kissane_codes(tensors: dict[str, Tensor], x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """f and x̂ of raw x: activations are multiplied by the scales going in, and divided coming out."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = x * scales.double()[:, None]
    f = torch.einsum("bsd,sdn->bn", x, t["W_enc"]).add(t["b_enc"]).clamp_min(0)
    y = torch.einsum("bn,nsd->bsd", f, t["W_dec"]) + t["b_dec"]
    return f, y / scales.double()[:, None]


# -- dictionary_learning --------------------------------------------------------------------------------------------


@dataclass
class Learned:
    """A state dictionary of CrossCoder or BatchTopKCrossCoder, with the settings that lie beside it."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def code_norm(self) -> Tensor:
        w = self.tensors["decoder.weight"].double()
        per_source = torch.sqrt((w**2).sum(-1))
        whole = torch.sqrt((w**2).sum((0, 2)))
        number = int(self.tensors.get("code_normalization_id", torch.tensor(1)))
        mixed = self.settings.get("code_normalization_alpha_sae", 1.0) * whole
        mixed = mixed + self.settings.get("code_normalization_alpha_cc", 0.1) * per_source.sum(0)
        return {1: per_source.sum(0), 2: whole, 3: mixed, 4: torch.ones(N).double()}[number]

    def normaliser(self) -> tuple[Tensor, Tensor] | None:
        mean = self.tensors.get("activation_mean")
        if mean is None or bool(mean.isnan().any()) or bool(self.tensors["activation_std"].isnan().any()):
            return None
        scale = self.tensors["activation_global_scale"].double()
        return mean.double(), scale.expand(mean.shape[0])

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f and x̂ of raw x, at the threshold."""
        own = self.normaliser()
        t = {name: tensor.double() for name, tensor in self.tensors.items()}
        if own is not None:
            x = (x - own[0]) * own[1][None, :, None]
        read = x[:, self.settings.get("encoder_layers") or list(range(x.shape[1]))]
        p = torch.einsum("bsd,sdn->bn", read, t["encoder.weight"]).add(t["encoder.bias"]).clamp_min(0)
        f = p * (p * self.code_norm() > t["threshold"]) if "threshold" in t else p
        y = torch.einsum("bn,snd->bsd", f, t["decoder.weight"]) + t["decoder.bias"]
        if own is not None:
            y = y / (own[1][None, :, None] + 1e-8) + own[0]
        return f, y


def learned(
    *, norm: str = "CROSSCODER", top_k: bool = True, normaliser: str = "none", sources: int = S, seed: int = 0
) -> Learned:
    """Weights as the newest fork saves them; `normaliser` is none, per_source, or scalar (jkminder's fork)."""
    g = draws(seed)
    tensors = {
        "encoder.weight": torch.randn(sources, D, N, generator=g),
        "encoder.bias": torch.randn(N, generator=g) * 0.3,
        "decoder.weight": torch.randn(sources, N, D, generator=g),
        "decoder.bias": torch.randn(sources, D, generator=g),
        "code_normalization_id": torch.tensor(NORMS[norm]),
        "activation_mean": torch.full((sources, D), NAN),
        "activation_std": torch.full((sources, D), NAN),
        "activation_global_scale": torch.ones(sources),
        "target_rms": torch.tensor(1.0),
    }
    tensors["decoder.weight"] *= torch.logspace(-1, 0.5, N)[None, :, None]  # norms differ, so that selection does
    if top_k:
        tensors |= {"k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(2.5)}
    if normaliser != "none":
        std = torch.rand(sources, D, generator=g) + torch.linspace(0.5, 3, sources)[:, None]
        scale = 10 / torch.sqrt((std**2).sum(1) + 1e-8)
        tensors["activation_mean"] = torch.randn(sources, D, generator=g)
        tensors["activation_std"] = std
        tensors["activation_global_scale"] = scale if normaliser == "per_source" else scale.mean()
        tensors["target_rms"] = torch.tensor(10.0)
    return Learned(tensors)


def train_directory(directory: Path, made: Learned, *, name: str = "model_final.pt", prefix: str = "") -> Path:
    """As the trainer leaves it: a state dictionary and `config.json` of trainer and buffer."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + key: tensor for key, tensor in made.tensors.items()}, directory / name)
    trainer = {"dict_class": class_of(made), "layer": 13, "lm_name": "chat-base", "k": _k(made), **made.settings}
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": None}), encoding="utf-8")
    return directory


def pretrained_directory(directory: Path, made: Learned, **settings: Any) -> Path:
    """As `save_pretrained` leaves it: safetensors and a flat `config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in made.tensors.items()}, directory / "model.safetensors")
    flat = {"activation_dim": D, "dict_size": N, "num_layers": S, "dict_class": class_of(made)}
    flat |= {"k": _k(made)} if "k" in made.tensors else {}
    content = json.dumps({**flat, **made.settings, **settings})
    (directory / "config.json").write_text(content, encoding="utf-8")
    return directory


def class_of(made: Learned) -> str:
    return "BatchTopKCrossCoder" if "threshold" in made.tensors else "CrossCoder"


def _k(made: Learned) -> int | None:
    return int(made.tensors["k"]) if "k" in made.tensors else None
