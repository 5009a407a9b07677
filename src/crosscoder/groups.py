"""Latent groups in memory: their parameters, stored only where they read and write, and where those columns lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosscoder.codes import Pattern, pointers
from crosscoder.sources import SourceSet
from crosscoder.wiring import LatentGroup, Wiring


class GroupWeights(nn.Module):
    """Parameters of one latent group, stored only where it reads and writes."""

    def __init__(self, encoder: Tensor, decoder: Tensor) -> None:
        super().__init__()
        num_latents = encoder.shape[0]
        self.encoder = nn.Parameter(encoder)
        self.decoder = nn.Parameter(decoder)
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.gate: Tensor
        self.threshold: Tensor
        self.register_buffer("gate", torch.ones(num_latents))
        self.register_buffer("threshold", torch.full((), float("nan")))


class GroupPart:
    """Some latents of one group: their weights, differentiable, and the group's columns."""

    def __init__(self, encoder: Tensor, bias: Tensor, decoder: Tensor, gate: Tensor, *, layout: GroupLayout) -> None:
        self.encoder, self.bias, self.decoder, self.gate = encoder, bias, decoder, gate
        self.read, self.add = layout.read, layout.add


class GroupLayout:
    """Where one group lies: its latents, and its columns among the packed reads and writes."""

    def __init__(self, group: LatentGroup, wiring: Wiring) -> None:
        self.group = group
        self.first, self.last = wiring.latent_ranges[wiring.groups.index(group)]
        own = wiring.sources.subset(group.writes)
        self.write_slices = own.slices
        self.source_ids = [wiring.writes.index(key) for key in own.keys]
        self._reads = _selector(wiring.reads, group.reads)
        self._writes = _selector(wiring.writes, group.writes)
        self.widths = own.widths

    def read(self, x: Tensor) -> Tensor:
        """The group's columns of packed reads (last dimension)."""
        return x if self._reads is None else x[..., self._reads]

    def written(self, y: Tensor) -> Tensor:
        """The group's columns of packed writes (last dimension)."""
        return y if self._writes is None else y[..., self._writes]

    def add(self, y: Tensor, part: Tensor) -> Tensor:
        """`y` with the group's reconstruction added onto its columns."""
        if self._writes is None:
            return y + part
        return y.index_add(1, torch.tensor(self._writes, device=y.device), part)

    def norms(self, decoder: Tensor) -> Tensor:
        """(latents, written sources of the group): the norm of each source's stretch of the decoder."""
        return torch.stack([part.norm(dim=1) for part in decoder.split(list(self.widths), dim=1)], dim=1)

    def part(self, weights: GroupWeights, latents: Tensor) -> GroupPart:
        """The weights of those of `latents` that are in this group."""
        ids = latents[self.pairs(latents)] - self.first
        rows = (weights.encoder[ids], weights.encoder_bias[ids], weights.decoder[ids], weights.gate[ids])
        return GroupPart(*rows, layout=self)

    def pairs(self, latents: Tensor) -> Tensor:
        """Which active pairs belong to this group."""
        return ((latents >= self.first) & (latents < self.last)).nonzero().squeeze(1)

    def pattern(self, rows: Tensor, latents: Tensor, *, num_rows: int) -> Pattern:
        """The pattern of pairs that all belong to this group."""
        return Pattern(pointers(rows, num_rows=num_rows), latents - self.first, self.last - self.first)


def _selector(sources: SourceSet, keys: tuple[str, ...]) -> list[int] | None:
    return None if sources.keys == keys else list(sources.columns(keys))
