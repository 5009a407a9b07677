"""The normaliser of dictionary_learning's crosscoders: what its buffers mean, fork by fork.

    x'_s = (x_s − μ_s) g_s      x_s = x'_s / (g_s + 1e-8) + μ_s      g_s = target_rms / sqrt(Σ_d σ_{s,d}² + 1e-8)

Buffers activation_mean, activation_std (S, d), activation_global_scale (S) or, in jkminder's fork, one scalar for all
sources, target_rms (). All NaN statistics mean that there is no normaliser; NaN in some of them is damage. Files of
before the normaliser have none of the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.errors import FileFormatError
from crosscoder.interop.weights import Remarks, check_tensors

EPSILON = 1e-8
BUFFERS = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")


@dataclass(frozen=True)
class Normaliser:
    """Mean and scale of every source, and the factor g / (g + 1e-8) that its decoder takes on."""

    mean: Float[Tensor, "sources width"]
    scale: Float[Tensor, "sources"]
    correction: Float[Tensor, "sources"]


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, origin: str, remarks: Remarks) -> Normaliser:
    """The normaliser of a file whose weights were checked; zeros and ones where it has none."""
    num_sources, _, width = tensors["decoder.weight"].shape
    none = Normaliser(torch.zeros(num_sources, width), torch.ones(num_sources), torch.ones(num_sources))
    statistics = [tensors[name] for name in ("activation_mean", "activation_std") if name in tensors]
    if not statistics:
        remarks.assumed.append("no normaliser: the file is of before there was one, or was saved without")
        return none
    if all(bool(tensor.isnan().all()) for tensor in statistics):
        remarks.assumed.append("no normaliser: its statistics are all NaN, as this tool writes where there is none")
        return none
    _refuse_partly_nan(tensors, origin=origin)
    shape = (num_sources, width)
    single = tensors.get("activation_global_scale", torch.ones(num_sources)).ndim == 0
    scales = () if single else (num_sources,)
    check_tensors(
        tensors,
        {"activation_mean": shape, "activation_std": shape, "activation_global_scale": scales},
        origin=origin,
    )
    scale = tensors["activation_global_scale"].float().expand(num_sources).clone()
    if single and num_sources > 1:
        remarks.assumed.append("one scale for all sources: the file's scale is a single number (jkminder's fork)")
    _check_scale(scale, origin=origin)
    _compare(tensors, settings, scale, single=single, remarks=remarks)
    correction = scale.double() / (scale.double() + EPSILON)
    if bool((correction < 1 - 1e-6).any()):
        remarks.warnings.append(
            f"scales as small as {float(scale.min()):.2g}: the tool's 1e-8 shrinks its reconstruction by up to "
            f"{float(1 - correction.min()):.1e}, which is kept by shrinking decoder norms as much"
        )
    return Normaliser(tensors["activation_mean"].float(), scale, correction.float())


def _refuse_partly_nan(tensors: Mapping[str, Tensor], *, origin: str) -> None:
    counts = {
        name: (int(tensors[name].isnan().sum()), tensors[name].numel())
        for name in ("activation_mean", "activation_std")
        if name in tensors
    }
    if any(bad for bad, _ in counts.values()):
        raise FileFormatError(
            f"the normaliser of {origin} is partly NaN.",
            details=[f"{name}: {bad:,} of {total:,} are NaN" for name, (bad, total) in counts.items()],
            hint="All NaN would mean that there is none; this is a file whose statistics went wrong. Nobody can tell "
            "what it was trained on: take another checkpoint.",
        )


def _check_scale(scale: Tensor, *, origin: str) -> None:
    if not bool((scale > 0).all()):
        raise FileFormatError(
            f"expected positive scales in {origin}; got {scale.tolist()}.",
            hint="The normaliser's activation_global_scale is damaged: take another checkpoint.",
        )


def _compare(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], scale: Tensor, *, single: bool, remarks: Remarks
) -> None:
    """Warn where the settings' target, or the statistics, disagree with the scale that the tool multiplies by."""
    target = float(tensors["target_rms"]) if "target_rms" in tensors else None
    said = settings.get("target_rms")
    if isinstance(said, int | float) and target is not None and abs(said - target) > 1e-6 * abs(target):
        remarks.warnings.append(f"the settings say target_rms = {said:g}, the tensor {target:g}: tensors taken")
    if target is None or single:
        return
    expected = target / (tensors["activation_std"].float().square().sum(1) + EPSILON).sqrt()
    if not torch.allclose(expected, scale, rtol=1e-3):
        remarks.warnings.append(
            f"scales {scale.tolist()} do not follow from activation_std and target_rms ({expected.tolist()}): "
            "activation_global_scale taken, which is what the tool multiplies by"
        )
