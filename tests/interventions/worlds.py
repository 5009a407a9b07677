"""Crosscoders of the toy models with random weights, token batches, and edits computed without hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, Nonlinearity
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import Wiring, acausal, weakly_causal

WIDTH = 32
BASE, CHAT = "base/layers.1.resid_post", "chat/layers.1.resid_post"


def sources(*keys: str) -> SourceSet:
    return SourceSet([Source.parse(key, width=WIDTH) for key in keys])


def random_crosscoder(wiring: Wiring, nonlinearity: Nonlinearity | None = None, *, seed: int = 0) -> Crosscoder:
    """In double precision, with a normaliser that does something and about a third of the latents active."""
    cc = Crosscoder(wiring, nonlinearity or BatchTopK(4), seed=seed, across_sources="independent").double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in cc.weights:
            weights.encoder.mul_(3)
            weights.encoder_bias.copy_(0.3 * torch.randn(weights.encoder_bias.shape, generator=generator))
            weights.threshold.fill_(0.2)
        cc.bias.copy_(0.1 * torch.randn(cc.bias.shape, generator=generator))
    cc.refresh_gate()
    scale = 1 + torch.arange(len(cc.sources)).double() / 3
    cc.set_normaliser(0.1 * torch.randn(cc.sources.width, generator=generator).double(), scale)
    return cc.eval()


def single(alias: str = "base") -> Crosscoder:
    return random_crosscoder(acausal(sources(f"{alias}/layers.1.resid_post"), num_latents=24))


def double() -> Crosscoder:
    return random_crosscoder(acausal(sources(BASE, CHAT), num_latents=24))


def layered() -> Crosscoder:
    keys = [f"chat/layers.{layer}.resid_post" for layer in range(2)]
    return random_crosscoder(acausal(sources(*keys), num_latents=24))


def causal() -> Crosscoder:
    keys = [f"chat/layers.{layer}.resid_post" for layer in range(2)]
    return random_crosscoder(weakly_causal(sources(*keys), num_latents_per_layer=12))


def layered_pair() -> Crosscoder:
    keys = [f"{alias}/layers.{layer}.resid_post" for alias in ("base", "chat") for layer in range(2)]
    return random_crosscoder(acausal(sources(*keys), num_latents=24))


WORLDS = {
    "one model": single, "two models": double, "layers": layered, "causal layers": causal, "layers of two": layered_pair
}  # fmt: skip


def token_ids(batch: int = 2, positions: int = 9) -> Tensor:
    """Token ids that are not special and not all alike."""
    return 7 + (torch.arange(batch * positions) * 53 % 390).view(batch, positions)


def padded(ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The last tokens of each text, padded on the left, and the mask."""
    mask = torch.stack([(torch.arange(ids.shape[1]) >= ids.shape[1] - n).long() for n in lengths])
    return ids * mask, mask


def clean_reads(cc: Crosscoder, models: Mapping[str, StudiedModel], ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Packed raw reads of all tokens in unedited models, (batch * positions, reads)."""
    found = {
        source.key: models[source.model].read([source.site], ids, attention_mask=mask)[source.site].flatten(0, 1)
        for source in cc.reads
    }
    return torch.cat([found[key] for key in cc.reads.keys], dim=1)


def dense_code(cc: Crosscoder, x: Tensor) -> Tensor:
    """`f` by the definition, for one or more groups under BatchTopK's threshold; x packs the reads."""
    parts = []
    for group, weights in zip(cc.wiring, cc.weights, strict=True):
        columns = [c for key in group.reads for c in range(*cc.reads.slices[key].indices(10**6))]
        scale = torch.cat([cc.scale[cc.sources.index(key)].expand(WIDTH) for key in group.reads])
        mean = torch.cat([cc.mean[cc.sources.slices[key]] for key in group.reads])
        pre = ((x[:, columns] - mean) * scale) @ weights.encoder.T + weights.encoder_bias
        parts.append(torch.where(pre * weights.gate > weights.threshold, pre, 0.0))
    return torch.cat(parts, dim=1).detach()


def raw_decoder(cc: Crosscoder, key: str) -> Tensor:
    """Decoder rows of all latents at a source, as the model has it."""
    rows = torch.zeros(cc.num_latents, WIDTH, dtype=torch.float64)
    for (first, last), group, weights in zip(cc.wiring.latent_ranges, cc.wiring, cc.weights, strict=True):
        if key in group.writes:
            place = group.writes.index(key) * WIDTH
            rows[first:last] = weights.decoder.detach()[:, place : place + WIDTH] / cc.scale[cc.sources.index(key)]
    return rows
