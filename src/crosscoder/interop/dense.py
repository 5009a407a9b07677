"""A crosscoder as other tools have it: every latent reads and writes every source, all of one width.

Where a latent group does not read or write, there are zeros; the function is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError


@dataclass(frozen=True)
class Dense:
    """Weights in normalised space, and the normaliser, with sources as an axis."""

    encoder: Float[Tensor, "sources width latents"]
    encoder_bias: Float[Tensor, "latents"]
    decoder: Float[Tensor, "latents sources width"]
    bias: Float[Tensor, "sources width"]
    mean: Float[Tensor, "sources width"]
    scale: Float[Tensor, "sources"]
    has_zeros: bool

    @property
    def has_normaliser(self) -> bool:
        """Whether the normaliser does anything."""
        return bool((self.mean != 0).any() or (self.scale != 1).any())


@torch.no_grad()
def dense(crosscoder: Crosscoder) -> Dense:
    """The dense weights; raises FileFormatError for what no layout of other tools can say."""
    _refuse_others(crosscoder)
    sources = crosscoder.sources
    return Dense(
        encoder=torch.stack([_encoder(crosscoder, key) for key in sources.keys]),
        encoder_bias=torch.cat([weights.encoder_bias for weights in crosscoder.weights]),
        decoder=torch.stack([crosscoder.decoder_rows(key) for key in sources.keys], dim=1),
        bias=crosscoder.bias.view(len(sources), -1),
        mean=crosscoder.mean.view(len(sources), -1),
        scale=crosscoder.scale,
        has_zeros=any(group.reads != sources.keys or group.writes != sources.keys for group in crosscoder.wiring),
    )


def _encoder(crosscoder: Crosscoder, key: str) -> Tensor:
    """The encoder (width, latents) at one source; zero where a group does not read it."""
    sources, parts = crosscoder.sources, list[Tensor]()
    for group, weights in zip(crosscoder.wiring, crosscoder.weights, strict=True):
        own = sources.subset(group.reads)
        zeros = weights.encoder.new_zeros(group.num_latents, sources[key].width)
        parts.append(weights.encoder[:, own.slices[key]] if key in own else zeros)
    return torch.cat(parts).T


def _refuse_others(crosscoder: Crosscoder) -> None:
    widths = sorted(set(crosscoder.sources.widths))
    unwritten = [key for key in crosscoder.sources.keys if key not in crosscoder.writes]
    reasons = {
        f"sources of different widths: {widths}": len(widths) > 1,
        f"sources that are read and not written: {', '.join(unwritten)}": bool(unwritten),
        "a skip path beside the latents": any(weights.skip is not None for weights in crosscoder.weights),
        "a normaliser folded into the weights: export the crosscoder that it was folded from": (
            crosscoder.folded_normaliser
        ),
    }
    found = [reason for reason, so in reasons.items() if so]
    if found:
        raise FileFormatError(
            "this crosscoder has what other tools' layouts cannot say.",
            details=found,
            hint="Share it as it is: crosscoder.save(path), crosscoder.push_to_hub(id).",
        )
