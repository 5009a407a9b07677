"""The layout of the first open model diff (ckkissane, Gemma 2 2B base and chat, 2024), shared by Nanda's Crosscoders.

    f = relu(Σ_s (s_s · x_s) W_enc[s] + b_enc)        s_s · x̂_s = Σ_j f_j W_dec[j, s] + b_dec[s]
    W_enc (S, d, n)    W_dec (n, S, d)    b_enc (n)    b_dec (S, d)

The scales `s_s = √d / E‖x_s‖` were computed on the fly in training and are *not in the file*: they are asked for, or
known from the authors' notebook for the published weights. Leaving them out gives codes that look right and are wrong.
Models are named by convention only: 0 is base, 1 is chat. The settings' `device` is not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crosscoder.errors import ConfigError, FileFormatError
from crosscoder.interop.weights import ForeignWeights, Remarks, check_tensors, refuse_unknown
from crosscoder.nonlinearities import ReLU

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
SCALES_KEY = "activation_scales"
PUBLISHED = {"ckkissane/crosscoder-gemma-2-2b-model-diff": (0.2758961493232058, 0.24422852496546169)}
"""Scales of published weights (base, chat), from the authors' demo notebook."""
PUBLISHED_MODELS = {
    "ckkissane/crosscoder-gemma-2-2b-model-diff": {"base": "google/gemma-2-2b", "chat": "google/gemma-2-2b-it"}
}
_HOOK = re.compile(r"^blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)$")


def read(tensors: Mapping[str, Tensor], *, origin: str) -> ForeignWeights:
    """The weights of a file in this layout, with scales of 1 in place of the true ones, which it does not hold."""
    check_tensors(tensors, dict.fromkeys(NAMES), origin=origin)
    refuse_unknown(tensors, NAMES, origin=origin)
    if tensors["W_enc"].ndim != 3:
        raise FileFormatError(
            f"expected W_enc of {origin} as (sources, width, latents); got {tuple(tensors['W_enc'].shape)}."
        )
    num_sources, width, latents = tensors["W_enc"].shape
    shapes = {"W_dec": (latents, num_sources, width), "b_enc": (latents,), "b_dec": (num_sources, width)}
    check_tensors(tensors, shapes, origin=origin)
    decoder = tensors["W_dec"].float()
    return ForeignWeights(
        encoder=tensors["W_enc"].float(),
        encoder_bias=tensors["b_enc"].float(),
        decoder=decoder,
        bias=tensors["b_dec"].float(),
        mean=torch.zeros(num_sources, width),
        scale=torch.ones(num_sources),
        reads=tuple(range(num_sources)),
        nonlinearity=ReLU(),
        gate=decoder.norm(dim=2).sum(1),
        threshold=torch.tensor(float("nan")),
    )


def site_of(settings: Mapping[str, Any], folder: str) -> str | None:
    """The site that the settings (or else the folder's name) call by a TransformerLens hook name."""
    for name in (settings.get("hook_point"), folder):
        match = _HOOK.match(name) if isinstance(name, str) else None
        if match:
            return f"layers.{int(match[1])}.{match[2]}"
    return None


def find_scales(
    settings: Mapping[str, Any],
    *,
    given: tuple[float, ...] | None,
    repository: str | None,
    num_sources: int,
    remarks: Remarks,
) -> tuple[float, ...]:
    """What activations were multiplied by: as given, as our own export wrote it, or as known for published weights.

    Raises ConfigError where nobody says.
    """
    if given is not None:
        return given
    written = settings.get(SCALES_KEY)
    if isinstance(written, list) and len(written) == num_sources:
        return tuple(float(value) for value in written)
    if repository in PUBLISHED:
        values = PUBLISHED[repository]
        remarks.assumed.append(
            f"scales {values[0]} (base), {values[1]} (chat): the authors' notebook, for {repository}"
        )
        return values
    raise ConfigError(
        "files of this layout do not say what activations were multiplied by, and codes are wrong without it.",
        details=[
            f"expected  {num_sources} scales, √width / mean norm of each model's activations",
            *(f"known     {name}: {values}" for name, values in PUBLISHED.items()),
        ],
        hint="Give them: --scales base=0.28,chat=0.24 (scales=...); 1 for each where they are folded into the weights.",
    )
