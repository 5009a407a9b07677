"""What a foreign file says once its names and shapes are understood, and the Crosscoder that computes the same.

With sources s of equal width d, latents j, and x̃_s = (x_s − μ_s) · c_s:

    p = Σ_{s read} x̃_s W_enc[s] + b_enc      f = nonlinearity(p)      x̂_s = (Σ_j f_j W_dec[j, s] + b_dec[s]) / c_s + μ_s

Weights stay as they are in the file, in normalised space; the normaliser is stored beside them, so that decoder norms
are those of whoever trained it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError
from crosscoder.nonlinearities import BatchTopK, JumpReLU, Nonlinearity
from crosscoder.sources import SourceSet
from crosscoder.wiring import LatentGroup, Wiring


@dataclass
class Remarks:
    """What was taken for granted while a file was read, and what in it contradicts itself."""

    assumed: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class ForeignWeights:
    """One crosscoder of another tool, in canonical axes; `reads` are places among the written sources.

    `gate` is the norm over sources that the tool selects on, `threshold` the score that has to be exceeded (BatchTopK)
    or the pre-activation per latent (JumpReLU); NaN where it was never set.
    """

    encoder: Float[Tensor, "reads width latents"]
    encoder_bias: Float[Tensor, "latents"]
    decoder: Float[Tensor, "latents sources width"]
    bias: Float[Tensor, "sources width"]
    mean: Float[Tensor, "sources width"]
    scale: Float[Tensor, "sources"]
    reads: tuple[int, ...]
    nonlinearity: Nonlinearity
    gate: Float[Tensor, "latents"]
    threshold: Float[Tensor, "*latents"]


@torch.no_grad()
def build(weights: ForeignWeights, sources: SourceSet) -> Crosscoder:
    """The Crosscoder of these weights over `sources`, in eval mode."""
    order = sorted(range(len(weights.reads)), key=lambda place: weights.reads[place])
    reads = tuple(sources.keys[weights.reads[place]] for place in order)
    group = LatentGroup("all", weights.encoder.shape[2], reads, sources.keys)
    cc = Crosscoder(Wiring(sources, [group]), weights.nonlinearity, seed=None)
    (own,) = cc.weights
    own.encoder.copy_(weights.encoder[order].flatten(0, 1).T)
    own.encoder_bias.copy_(weights.encoder_bias)
    own.decoder.copy_(weights.decoder.flatten(1))
    cc.bias.copy_(weights.bias.flatten())
    cc.set_normaliser(weights.mean.flatten().float(), weights.scale.float())
    cc.refresh_gate()
    if isinstance(weights.nonlinearity, BatchTopK):
        own.gate.copy_(weights.gate)
        own.threshold.copy_(weights.threshold)
    if isinstance(weights.nonlinearity, JumpReLU):
        assert own.log_threshold is not None, "JumpReLU has a threshold per latent"
        own.log_threshold.copy_(weights.threshold.log())
    return cc.eval()


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int] | None], *, origin: str) -> None:
    """Raises FileFormatError unless all of `shapes` are there, as declared (None is any), and finite."""
    wrong = [f"missing  {name}" for name in shapes if name not in tensors]
    wrong += [
        f"shape    {name}: expected {tuple(shape)}, got {tuple(tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in tensors and shape is not None and tensors[name].shape != tuple(shape)
    ]
    wrong += [f"NaN/inf  {name}" for name in shapes if name in tensors and not tensors[name].isfinite().all()]
    if wrong:
        raise FileFormatError(
            f"the tensors of {origin} do not make a crosscoder.",
            details=[*wrong[:12], *(f"found    {name} {tuple(tensor.shape)}" for name, tensor in tensors.items())][:24],
            hint="The file is incomplete or of another layout: copy it again, or save it again with its own tool.",
        )


def refuse_unknown(tensors: Mapping[str, Tensor], known: Sequence[str], *, origin: str) -> None:
    """Raises FileFormatError for tensors that this reader has no meaning for: they could change the function."""
    unknown = [f"unknown  {name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if name not in known]
    if unknown:
        raise FileFormatError(
            f"{origin} holds tensors that no known version of this layout has.",
            details=unknown[:12],
            hint="It is of a fork or another class of the tool; leaving them out could change what it computes.",
        )
