"""The crosscoders of dictionary_learning and its forks (jkminder, science-of-finetuning, crosscoder_learning).

    p = relu(Σ_s (x_s − μ_s) g_s · encoder.weight[s] + encoder.bias)
    CrossCoder            f = p
    BatchTopKCrossCoder   f = p · 1[p · c > τ]        c_j by code normalisation, of the decoder as stored:
        CROSSCODER Σ_s ‖d_j^s‖    SAE ‖d_j‖    NONE 1    MIXED α_sae ‖d_j‖ + α_cc Σ_s ‖d_j^s‖
    x̂_s = (f · decoder.weight[s] + decoder.bias[s]) / (g_s + 1e-8) + μ_s

encoder.weight (S, d, n), decoder.weight (S, n, d). MIXED becomes JumpReLU with θ_j = τ / c_j, which is the same code.
DECOUPLED with BatchTopK has a code per source and is refused. Where tensors and settings disagree, tensors are right:
settings keep constructor defaults after a round trip through `.pt`. The 1e-8 is moved into the decoder, as a factor
g / (g + 1e-8). Source: Minder et al. 2025 and the code of the forks named above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crosscoder.errors import FileFormatError, NotCalibrated
from crosscoder.interop import dictionary_learning_normaliser as normaliser
from crosscoder.interop.weights import ForeignWeights, Remarks, check_tensors, refuse_unknown
from crosscoder.nonlinearities import BatchTopK, CodeNorm, JumpReLU, Nonlinearity, ReLU

CODE_NORMS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
OWN_NORMS: dict[str, CodeNorm] = {"CROSSCODER": "sum", "SAE": "concat", "NONE": "none"}
WEIGHTS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
BUFFERS = (*normaliser.BUFFERS, "code_normalization_id", "k", "threshold")
ALPHAS = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}


def read(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    uncalibrated: bool,
    origin: str,
    remarks: Remarks,
) -> ForeignWeights:
    """The weights of a file in this layout; `uncalibrated` takes one whose threshold was never set."""
    tensors = _plain_names(tensors, origin)
    _check(tensors, origin=origin)
    _refuse_processor(settings, origin=origin)
    num_sources = tensors["decoder.weight"].shape[0]
    _compare_sizes(tensors, settings, remarks)
    own = normaliser.read(tensors, settings, origin=origin, remarks=remarks)
    stored = tensors["decoder.weight"].float()
    code_norm = _code_norm(tensors, settings, remarks)
    gate = _gate(stored, code_norm, settings, remarks)
    kind, threshold = _selection(
        tensors, settings, code_norm, gate, uncalibrated=uncalibrated, origin=origin, remarks=remarks
    )
    return ForeignWeights(
        encoder=tensors["encoder.weight"].float(),
        encoder_bias=tensors["encoder.bias"].float(),
        decoder=stored.transpose(0, 1) * own.correction[:, None],
        bias=tensors["decoder.bias"].float() * own.correction[:, None],
        mean=own.mean,
        scale=own.scale,
        reads=_reads(settings, tensors["encoder.weight"].shape[0], num_sources=num_sources, origin=origin),
        nonlinearity=kind,
        gate=gate,
        threshold=threshold,
    )


def layer_of(settings: Mapping[str, Any]) -> str | None:
    """The site that the trainer's `layer` means by this tool's convention: the residual stream after that layer."""
    layer = settings.get("layer")
    return f"layers.{layer}.resid_post" if isinstance(layer, int) and not isinstance(layer, bool) else None


def _plain_names(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Names without what torch.compile puts before them."""
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise FileFormatError(f"{origin} holds tensors twice, with and without the prefix _orig_mod.")
    return plain


def _check(tensors: Mapping[str, Tensor], *, origin: str) -> None:
    check_tensors(tensors, dict.fromkeys(WEIGHTS), origin=origin)
    refuse_unknown(tensors, (*WEIGHTS, *BUFFERS), origin=origin)
    for name in ("encoder.weight", "decoder.weight"):
        if tensors[name].ndim != 3:
            raise FileFormatError(
                f"expected {name} of {origin} with three axes; got {tuple(tensors[name].shape)}.",
                hint="With two axes it is a sparse autoencoder of this tool, not a crosscoder.",
            )
    num_reads, width, latents = tensors["encoder.weight"].shape
    num_sources = tensors["decoder.weight"].shape[0]
    shapes = {
        "encoder.weight": (num_reads, width, latents),
        "encoder.bias": (latents,),
        "decoder.weight": (num_sources, latents, width),
        "decoder.bias": (num_sources, width),
    }
    check_tensors(tensors, shapes, origin=origin)


def _refuse_processor(settings: Mapping[str, Any], *, origin: str) -> None:
    if settings.get("latent_processor") is not None:
        raise FileFormatError(
            f"{origin} passes its code through a function (latent_processor) that no file holds.",
            hint="It cannot be converted: the reconstruction would differ.",
        )


def _compare_sizes(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], remarks: Remarks) -> None:
    num_sources, latents, width = tensors["decoder.weight"].shape
    found = {"activation_dim": width, "dict_size": latents, "num_layers": num_sources}
    for name, value in found.items():
        if settings.get(name) not in (None, value):
            remarks.warnings.append(f"the settings say {name} = {settings[name]}, the tensors {value}: tensors taken")


def _reads(settings: Mapping[str, Any], num_reads: int, *, num_sources: int, origin: str) -> tuple[int, ...]:
    """Places of the sources that the encoder takes, in the order of its weights."""
    listed = settings.get("encoder_layers")
    if listed is None and num_reads == num_sources:
        return tuple(range(num_sources))
    places = tuple(listed) if isinstance(listed, list) else ()
    if len(places) != num_reads or len(set(places)) != num_reads or not set(places) <= set(range(num_sources)):
        raise FileFormatError(
            f"{origin} reads {num_reads} sources and writes {num_sources}, and does not say which it reads.",
            details=["expected  encoder_layers in config.json, different places", f"found     {listed}"],
            hint="Put config.json of the crosscoder beside the weights.",
        )
    return places


def _code_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], remarks: Remarks) -> str:
    said = settings.get("code_normalization")
    said = said.upper() if isinstance(said, str) else None
    number = tensors.get("code_normalization_id")
    if number is not None:
        found = CODE_NORMS.get(int(number))
        if found is None:
            raise FileFormatError(
                f"expected code_normalization_id from 1 to {len(CODE_NORMS)}; got {int(number)}.",
                details=[f"{key} {name}" for key, name in CODE_NORMS.items()],
            )
        if said not in (None, found):
            remarks.warnings.append(
                f"the settings say code_normalization = {said}, the tensor code_normalization_id {found}: tensor taken"
            )
        return found
    if said is not None and said in CODE_NORMS.values():
        remarks.assumed.append(f"code normalisation {said}, from the settings: the file is of before it was a tensor")
        return said
    remarks.assumed.append("code normalisation CROSSCODER: the file is of before there was a choice")
    return "CROSSCODER"


def _gate(decoder: Tensor, code_norm: str, settings: Mapping[str, Any], remarks: Remarks) -> Tensor:
    """`c_j` of a decoder (sources, latents, width)."""
    norms = decoder.norm(dim=2)
    if code_norm == "NONE":
        return torch.ones_like(norms[0])
    if code_norm == "SAE":
        return norms.square().sum(0).sqrt()
    if code_norm != "MIXED":
        return norms.sum(0)
    alphas = {name: settings.get(name) for name in ALPHAS}
    for name, value in alphas.items():
        if value is None:
            remarks.assumed.append(f"{name} = {ALPHAS[name]}, the tool's default: no settings beside the weights say")
    sae, cc = (float(ALPHAS[name] if value is None else value) for name, value in alphas.items())
    return sae * norms.square().sum(0).sqrt() + cc * norms.sum(0)


def _selection(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    code_norm: str,
    gate: Tensor,
    *,
    uncalibrated: bool,
    origin: str,
    remarks: Remarks,
) -> tuple[Nonlinearity, Tensor]:
    """The nonlinearity, and its threshold."""
    said = settings.get("dict_class")
    batch_top_k = "threshold" in tensors or "k" in tensors or said == "BatchTopKCrossCoder"
    if said is not None and batch_top_k != (said == "BatchTopKCrossCoder"):
        remarks.warnings.append(f"the settings say {said}, but the tensors are of BatchTopKCrossCoder: tensors taken")
    if not batch_top_k:
        remarks.assumed.append(f"ReLU: there is no threshold; the sparsity penalty was on f · c, c = {code_norm}")
        return ReLU(), torch.tensor(float("nan"))
    if code_norm == "DECOUPLED" or ("threshold" in tensors and tensors["threshold"].numel() > 1):
        raise FileFormatError(
            f"{origin} is DECOUPLED: it has a code per source, f[s, j] = p_j · 1[p_j · ‖d_j^s‖ > τ_s].",
            details=["expected  one code for all sources", "found     one threshold and one selection per source"],
            hint="It cannot be converted exactly. Of the published ones, those named CCLoss and SAELoss can.",
        )
    k, threshold = _k(tensors, settings, remarks), _threshold(tensors, origin=origin)
    if threshold.isnan() and (code_norm == "MIXED" or not uncalibrated):
        raise _no_threshold(tensors, code_norm, origin=origin)
    if threshold.isnan():
        remarks.warnings.append("no threshold was ever set: calibrate(batches) before encoding in eval mode")
    if code_norm == "MIXED":
        remarks.assumed.append(f"JumpReLU with θ_j = τ / c_j for MIXED code normalisation; BatchTopK had k = {k}")
        return JumpReLU(), torch.where(gate > 0, threshold / gate, torch.inf)  # no decoder, no score
    return BatchTopK(k, code_norm=OWN_NORMS[code_norm]), threshold


def _threshold(tensors: Mapping[str, Tensor], *, origin: str) -> Tensor:
    """τ; NaN where it was never set, which this tool writes as −1."""
    value = tensors.get("threshold", torch.tensor(float("nan"))).float().reshape(())
    if value.isinf():
        raise FileFormatError(f"expected a finite threshold in {origin}; got {float(value)}.")
    return value if value >= 0 else torch.tensor(float("nan"))


def _no_threshold(tensors: Mapping[str, Tensor], code_norm: str, *, origin: str) -> NotCalibrated:
    found = f"threshold = {float(tensors['threshold'])}" if "threshold" in tensors else "no threshold"
    hint = "In Python: convert(..., uncalibrated=True), then crosscoder.calibrate(batches) on some rows, and save."
    if code_norm == "MIXED":
        hint = "Train it for longer than its threshold_start, or set the tensor: MIXED has nothing else to select by."
    return NotCalibrated(
        f"the threshold of {origin} was never set; by it, every positive latent would be on.",
        details=["expected  threshold >= 0", f"found     {found} (a run shorter than threshold_start steps)"],
        hint=hint,
    )


def _k(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], remarks: Remarks) -> int:
    said = settings.get("k")
    if "k" in tensors:
        found = int(tensors["k"])
        if isinstance(said, int) and said != found:
            remarks.warnings.append(f"the settings say k = {said}, the tensor k {found}: tensor taken")
        return found
    if isinstance(said, int):
        remarks.assumed.append(f"k = {said}, from the settings: the file has no tensor k")
        return said
    raise FileFormatError(
        "expected k, the latents per row, as a tensor or in the settings; got neither.",
        hint="Put config.json of the crosscoder beside the weights.",
    )
