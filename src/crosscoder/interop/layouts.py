"""Which file holds the weights, what lies beside it, and which tool's layout it is: told by the names of its tensors.

ckkissane             W_enc, W_dec, b_enc, b_dec          cc_weights.pt + cfg.json, or 3.pt + 3_cfg.json
dictionary_learning   encoder.weight, decoder.weight ...  model.safetensors or a .pt, + config.json
                                                          (+ trainer_config.json)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from crosscoder.errors import FileFormatError
from crosscoder.interop.foreign_files import read_settings, read_tensors

Layout = Literal["ckkissane", "dictionary_learning"]
LAYOUTS: tuple[Layout, ...] = ("ckkissane", "dictionary_learning")
_USUAL = ("cc_weights.pt", "model.safetensors", "model_final.pt")
_NO_WEIGHTS = ("last_eval_logs.pt",)


@dataclass(frozen=True)
class Found:
    """Foreign weights: their layout, the file, its tensors by name, and the settings beside it (empty where none)."""

    layout: Layout
    weights: Path
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def find(path: Path, *, layout: Layout | Literal["auto"]) -> Found:
    """The one crosscoder at `path`, a file or a directory.

    Raises FileFormatError when there is none, several, or one of another layout than asked for.
    """
    weights = path if path.is_file() else _weights_file(path)
    tensors = read_tensors(weights)
    found = _layout_of(tensors, weights)
    if layout not in ("auto", found):
        raise FileFormatError(
            f"expected {weights} in the layout {layout}; its tensors are named as in {found}.",
            hint=f"Use --from {found} (layout={found!r}), or leave it at auto.",
        )
    settings = _kissane_settings(weights) if found == "ckkissane" else _learning_settings(weights.parent)
    return Found(found, weights, tensors, settings)


def _weights_file(directory: Path) -> Path:
    _refuse_own(directory)
    usual = [directory / name for name in _USUAL if (directory / name).is_file()]
    others = sorted(p for p in directory.glob("*.pt") if p.name not in (*_USUAL, *_NO_WEIGHTS))
    below = sorted(p for name in ("cc_weights.pt", "model.safetensors") for p in directory.glob(f"*/{name}"))
    candidates = usual or others or below
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise FileFormatError(
            f"{directory} holds no weights of a known layout.",
            details=[f"expected  {name}" for name in (*_USUAL, "a file *.pt")],
            hint="Give the file itself, or the directory that holds it.",
        )
    raise FileFormatError(
        f"expected one crosscoder in {directory}; there are {len(candidates)}.",
        details=[str(candidate) for candidate in candidates[:12]],
        hint="Give one of these files.",
    )


def _refuse_own(directory: Path) -> None:
    settings = [read_settings(folder / "config.json") or {} for folder in (directory, directory / "crosscoder")]
    if any(str(own.get("format", "")).startswith("crosscoder.") for own in settings):
        raise FileFormatError(
            f"{directory} is a crosscoder of this package already.",
            hint="Load it with Crosscoder.load, or convert it to another layout with --to.",
        )


def _layout_of(tensors: Mapping[str, Tensor], weights: Path) -> Layout:
    names = {name.removeprefix("_orig_mod.") for name in tensors}
    if {"W_enc", "W_dec"} & names:
        return "ckkissane"
    if {"encoder.weight", "decoder.weight"} & names:
        return "dictionary_learning"
    raise FileFormatError(
        f"the tensors of {weights} are of no layout that is known here.",
        details=[
            "expected  W_enc, W_dec, b_enc, b_dec  (ckkissane)",
            "expected  encoder.weight, encoder.bias, decoder.weight, decoder.bias  (dictionary_learning)",
            *(f"found     {name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:12]),
        ],
        hint="Convert it to one of these with its own tool first.",
    )


def _kissane_settings(weights: Path) -> dict[str, Any]:
    own = read_settings(weights.with_name(f"{weights.stem}_cfg.json"))
    return own or read_settings(weights.with_name("cfg.json")) or {}


def _learning_settings(directory: Path) -> dict[str, Any]:
    """Settings of the crosscoder over those of its trainer, which lie in either of two files."""
    beside = read_settings(directory / "config.json") or {}
    published = read_settings(directory / "trainer_config.json") or {}
    trainers = [part["trainer"] for part in (published, beside) if isinstance(part.get("trainer"), dict)]
    merged: dict[str, Any] = {}
    for part in (*trainers, beside):
        merged |= {name: value for name, value in part.items() if value is not None}
    return merged
