"""Latent groups in memory: their parameters, stored only where they read and write, and where those columns lie.

A group with tied decoders keeps one decoder (latents, width) for all the sources that it writes: it is decoded once,
and its gradient is the sum over the sources. With tied norms `‖d_i^s‖` is made equal over s after every update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoder.kernels.spares import Spares
from crosscoder.nonlinearities import CodeNorm
from crosscoder.sources import SourceSet
from crosscoder.wiring import LatentGroup, Wiring

Piece = tuple[int, Tensor]
"""The place of a written source, and a contribution (rows, its width) to it."""


class GroupWeights(nn.Module):
    """Parameters of one latent group, stored only where it reads and writes."""

    def __init__(self, encoder: Tensor, decoder: Tensor, *, log_threshold: float | None, skip_width: int) -> None:
        super().__init__()
        num_latents = encoder.shape[0]
        self.encoder = nn.Parameter(encoder)
        self.decoder = nn.Parameter(decoder)
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        jumps = None if log_threshold is None else nn.Parameter(torch.full((num_latents,), log_threshold))
        self.log_threshold: nn.Parameter | None
        self.skip: nn.Parameter | None
        self.register_parameter("log_threshold", jumps)
        self.register_parameter("skip", nn.Parameter(torch.zeros(skip_width, encoder.shape[1])) if skip_width else None)
        self.gate: Tensor
        self.threshold: Tensor
        self.register_buffer("gate", torch.ones(num_latents))
        self.register_buffer("threshold", torch.full((), float("nan")))
        self.spares = Spares()
        self._rounded = torch.empty(0, dtype=torch.bfloat16)
        self._rounded_at: tuple[int, int] | None = None
        self._recorded = False

    @property
    def rounded_encoder(self) -> Float[Tensor, "latents reads"]:
        """The encoder in bf16; the same copy until the encoder may have changed.

        Whatever records a graph may be followed by an update, and a fused one does not count as a new version; an
        update that has rounded the encoder itself says so with `note_rounded`.
        """
        self._recorded |= torch.is_grad_enabled() and self.encoder.requires_grad
        if self.rounded_in_place is None:
            self._rounded = self.encoder.detach().to(torch.bfloat16)
        elif self._rounded_at != self._place:
            self._rounded.copy_(self.encoder.detach())
        self._rounded_at = None if self._recorded else self._place
        return self._rounded

    @property
    def rounded_in_place(self) -> Float[Tensor, "latents reads"] | None:
        """The memory of that copy, where there is one on the encoder's device."""
        return self._rounded if self._rounded.device == self.encoder.device and self._rounded.numel() else None

    def note_rounded(self) -> None:
        """That copy, if there is one, is the encoder as it now is."""
        self._rounded_at, self._recorded = self._place, False

    @property
    def _place(self) -> tuple[int, int]:
        """What changes when the encoder does."""
        encoder = self.encoder.detach()
        return encoder._version, encoder.data_ptr()  # pyright: ignore[reportPrivateUsage]

    def spend_gradients(self) -> None:
        """Forget the gradients, which an update has used; on a CPU, keep the memory of the large ones."""
        if self._recorded:  # what was recorded has been followed by an update
            self._rounded_at, self._recorded = None, False
        for name, parameter in self.named_parameters():
            if name in ("encoder", "decoder") and not parameter.is_cuda:
                self.spares.put(name, parameter.grad)
            parameter.grad = None


class GroupPart:
    """Some latents of one group: their weights as leaves of a graph of their own, and the group's layout.

    The gradients of a few latents stay as small as they are; `add_gradients` puts them where they belong.
    """

    def __init__(self, weights: GroupWeights, ids: Tensor, *, layout: GroupLayout) -> None:
        self._ids = ids
        self._whole = (weights.encoder, weights.encoder_bias, weights.decoder)
        self._leaves = [parameter.detach()[ids].requires_grad_() for parameter in self._whole]
        self.encoder, self.bias, self.decoder = self._leaves
        self.gate = weights.gate[ids]
        self.read, self.pieces = layout.read, layout.pieces

    def add_gradients(self) -> None:
        """Add the gradients of the leaves to those of the group."""
        for parameter, leaf in zip(self._whole, self._leaves, strict=True):
            if leaf.grad is not None:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad.index_add_(0, self._ids, leaf.grad)


class GroupLayout:
    """Where one group lies: its latents, and its columns among the packed reads and writes."""

    def __init__(self, group: LatentGroup, wiring: Wiring) -> None:
        self.group = group
        self.alone = len(wiring.groups) == 1
        self.first, self.last = wiring.latent_ranges[wiring.groups.index(group)]
        own = wiring.sources.subset(group.writes)
        self.write_slices = own.slices
        self.widths = own.widths
        self.source_ids = [wiring.writes.index(key) for key in own.keys]
        self.stored_widths = self.widths[:1] if group.tied == "decoder" else self.widths
        skipped = [key for key in own.keys if key in group.skips]
        self.skip_widths = [own[key].width for key in skipped]
        self._skip_ids = [wiring.writes.index(key) for key in skipped]
        self.read = Columns(wiring.reads, group.reads)
        self.written = Columns(wiring.writes, group.writes)
        self.everything = group.tied != "decoder" and own.keys == wiring.writes.keys
        copies = [(key,) for key in own.keys] if group.tied == "decoder" else [own.keys]
        self._written = [Columns(wiring.writes, keys) for keys in copies]
        self.skip_written = Columns(wiring.writes, tuple(skipped)) if skipped else None

    def new_weights(self, encoder: Tensor, decoder: Tensor, *, log_threshold: float | None) -> GroupWeights:
        """Weights of this group with that encoder and stored decoder."""
        return GroupWeights(encoder, decoder, log_threshold=log_threshold, skip_width=sum(self.skip_widths))

    def pieces(self, part: Float[Tensor, "rows stored"]) -> Iterator[Piece]:
        """What the product with the stored decoder adds to each source that the group writes."""
        if self.group.tied == "decoder":
            return ((i, part) for i in self.source_ids)
        return zip(self.source_ids, part.split(list(self.widths), dim=1), strict=True)

    def add_(self, writes: Float[Tensor, "rows writes"], part: Float[Tensor, "rows stored"]) -> None:
        """Add the product with the stored decoder onto the packed writes, in place."""
        for columns in self._written:
            columns.add_to(writes, part)

    def gather(self, writes: Float[Tensor, "rows writes"]) -> Float[Tensor, "rows stored"]:
        """What a gradient of the packed writes is to that product: the transpose of `add_`."""
        first, *others = (columns(writes) for columns in self._written)
        return sum(others, start=first)

    def skip_pieces(self, weights: GroupWeights, x: Float[Tensor, "rows reads"]) -> Iterator[Piece]:
        """What the affine path adds to the sources that it goes to."""
        assert weights.skip is not None, "only groups with an affine path are asked"
        product = self.read(x) @ weights.skip.T
        return zip(self._skip_ids, product.split(self.skip_widths, dim=1), strict=True)

    def expanded(self, decoder: Float[Tensor, "latents stored"]) -> Float[Tensor, "latents writes"]:
        """The decoder over all written columns, copies included."""
        return decoder.repeat(1, len(self.widths)) if self.group.tied == "decoder" else decoder

    def norms(self, decoder: Float[Tensor, "latents stored"]) -> Float[Tensor, "latents sources"]:
        """The norm of each written source's stretch of the decoder."""
        norms = torch.stack([part.norm(dim=1) for part in decoder.split(list(self.stored_widths), dim=1)], dim=1)
        return norms.expand(-1, len(self.widths))

    @torch.no_grad()
    def equalise(self, decoder: Float[Tensor, "latents stored"]) -> None:
        """Give the decoder vectors of every latent their mean norm, where norms are tied."""
        if self.group.tied == "norm":
            norms = self.norms(decoder)
            pointing = (norms > 0).sum(1, keepdim=True)  # a zero vector has no norm to give
            mean = norms.sum(1, keepdim=True) / pointing.clamp(min=1)
            factor = mean / norms.clamp(min=torch.finfo(norms.dtype).tiny)
            for part, own in zip(decoder.split(list(self.widths), dim=1), factor.split(1, dim=1), strict=True):
                part.mul_(own)

    def part(self, weights: GroupWeights, latents: Tensor) -> GroupPart:
        """The weights of those of `latents` that are in this group."""
        return GroupPart(weights, latents[self.pairs(latents)] - self.first, layout=self)

    def pairs(self, latents: Tensor) -> Tensor | slice:
        """Which of `latents` belong to this group."""
        if self.alone:
            return slice(None)
        return ((latents >= self.first) & (latents < self.last)).nonzero().squeeze(1)


class Columns:
    """Some sources' columns of rows that pack others too: a view where they lie side by side."""

    def __init__(self, sources: SourceSet, keys: tuple[str, ...]) -> None:
        columns = sources.columns(keys)
        adjacent = columns == tuple(range(columns[0], columns[0] + len(columns)))
        self._slice = slice(columns[0], columns[-1] + 1) if adjacent else None
        self._index = torch.tensor(columns)

    def __call__(self, x: Tensor) -> Tensor:
        """The columns of `x` (last dimension)."""
        if self._slice is not None:
            return x[..., self._slice]
        return x.index_select(-1, self._index_on(x.device))

    def add_to(self, x: Float[Tensor, "*rows width"], values: Float[Tensor, "*rows columns"]) -> None:
        """Add `values` onto these columns of `x`, in place."""
        if self._slice is not None:
            x[..., self._slice] += values
        else:
            x.index_add_(-1, self._index_on(x.device), values)

    def _index_on(self, device: torch.device) -> Tensor:
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index


def code_norm(norms: Float[Tensor, "latents sources"], kind: CodeNorm) -> Float[Tensor, "latents"]:
    """One norm per latent from those at its sources: `sum`, `concat` (root of squares), `max`, or `none` (1)."""
    match kind:
        case "sum":
            return norms.sum(1)
        case "concat":
            return norms.norm(dim=1)
        case "max":
            return norms.amax(1)
        case "none":
            return torch.ones_like(norms[:, 0])


def assemble(start: Sequence[Tensor], pieces: Iterable[Piece]) -> Float[Tensor, "rows writes"]:
    """Packed writes: what each source starts with (any rows), plus all pieces for it."""
    parts = list(start)
    for i, piece in pieces:
        parts[i] = parts[i] + piece
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
