"""Crosscoder: sparse latents that read and write several sources at once.

Raw activations `x` are packed, `x̃_s = (x_s − μ_s) · c_s` is stored with the weights, and for every latent group g

    p_g = x̃[:, R_g] W_enc_gᵀ + b_enc_g       f = nonlinearity(p, gate)       x̂̃[:, W_g] += f_g W_dec_g     (+ b_dec)

The gate of latent i is `Σ_s ‖d_i^s‖` in normalised space. Folding moves μ and c into the weights (raw in, raw out):

    W_enc ← W_enc diag(c)    b_enc ← b_enc − W_enc diag(c) μ    W_dec ← W_dec diag(1/c)    b_dec ← b_dec / c + μ

exactly, for unequal c; gate, thresholds and c are kept, so that selection and normalised norms stay what they were.
Sources: Lindsey et al. 2024 (crosscoder), Minder et al. 2025 (selection on decoder-norm scores).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoder import crosscoder_files, initialisation
from crosscoder.codes import Pattern, SparseCode, pointers
from crosscoder.errors import NotCalibrated, SourceMismatch, TextError, WiringError
from crosscoder.groups import GroupLayout, GroupPart, GroupWeights
from crosscoder.kernels import dispatch, reference, selection, sparse
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, ReLU, TopK
from crosscoder.sources import SourceSet
from crosscoder.wiring import LatentGroup, Wiring

Space = Literal["normalised", "raw"]


class Crosscoder(nn.Module):
    """A sparse dictionary over several sources; `encode` takes raw packed reads, `decode` gives raw packed writes.

    In train mode BatchTopK selects over the batch; in eval mode it uses the calibrated threshold.
    """

    def __init__(
        self,
        wiring: Wiring,
        nonlinearity: Nonlinearity,
        *,
        seed: int = 0,
        decoder_norm: float = 0.3,
        across_sources: initialisation.Across = "same",
    ) -> None:
        super().__init__()
        _refuse_unbuilt(wiring.groups)
        self.wiring = wiring
        self.nonlinearity = nonlinearity
        self.provenance: dict[str, Any] = {}
        self.folded_normaliser = False
        draw = partial(
            initialisation.rows,
            sources=wiring.sources,
            seed=seed,
            decoder_norm=decoder_norm,
            across_sources=across_sources,
        )
        self.groups = nn.ModuleList(_new_weights(group, draw) for group in wiring)
        self.bias = nn.Parameter(torch.zeros(wiring.writes.width))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(wiring.sources.width))
        self.register_buffer("scale", torch.ones(len(wiring.sources)))
        self._layout = [GroupLayout(group, wiring) for group in wiring]
        self.refresh_gate()

    # -- what it reads, writes and has ------------------------------------------------------------------------------

    @property
    def sources(self) -> SourceSet:
        """All sources of the wiring; `normalise` and the trainer take rows packed over these."""
        return self.wiring.sources

    @property
    def reads(self) -> SourceSet:
        """The sources that `encode` takes."""
        return self.wiring.reads

    @property
    def writes(self) -> SourceSet:
        """The sources that `decode` gives."""
        return self.wiring.writes

    @property
    def num_latents(self) -> int:
        """Latents of all groups together."""
        return self.wiring.num_latents

    @property
    def weights(self) -> list[GroupWeights]:
        """The groups' parameters, in the wiring's order."""
        return [group for group in self.groups if isinstance(group, GroupWeights)]

    @property
    def gate(self) -> Float[Tensor, "latents"]:
        """One number per latent that selection is made on: score = f · gate."""
        return torch.cat([group.gate for group in self.weights])

    @property
    def thresholds(self) -> Float[Tensor, "latents"]:
        """The score that each latent must exceed at inference; raises NotCalibrated where none was set."""
        spread = [group.threshold.expand(group.gate.shape) for group in self.weights]
        thresholds = torch.cat(spread)
        if thresholds.isnan().any():
            raise NotCalibrated(
                "this BatchTopK crosscoder has no threshold, which it needs to encode in eval mode.",
                hint="Call crosscoder.calibrate(batches) on some training rows, or encode in train mode "
                "(selection over the batch).",
            )
        return thresholds

    # -- encode and decode ------------------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "rows reads"]) -> Float[Tensor, "rows writes"]:
        """Raw packed reads to raw packed reconstructions."""
        return self.decode(self.encode(x))

    def encode(self, x: Float[Tensor, "rows reads"]) -> SparseCode:
        """The code of raw packed reads; raises SourceMismatch for another width, NotCalibrated as `thresholds` does."""
        self._check_width(x, self.reads, "reads")
        return self.encode_normalised(self._normalised_reads(x.to(self.bias.dtype)))

    def decode(self, code: SparseCode) -> Float[Tensor, "rows writes"]:
        """Raw packed writes of a code."""
        y = self.decode_normalised(code)
        if self.folded_normaliser:
            return y
        return y / self._scale_columns(self.writes) + self.mean[self._columns(self.writes)]

    def encode_normalised(self, x: Float[Tensor, "rows reads"], *, k: int | None = None) -> SparseCode:
        """The code of packed reads in normalised space; `k` stands in for the nonlinearity's own (a schedule's)."""
        parts = [layout.read(x) for layout in self._layout]
        if dispatch.dense(self.nonlinearity):
            return self._encode_dense(parts)
        with torch.no_grad():
            found = self._select(parts, k)
        pattern = Pattern(pointers(found.rows, num_rows=x.shape[0]), found.latents, self.num_latents)
        return SparseCode.of(pattern, self._attach(parts, found, pattern))

    def decode_normalised(self, code: SparseCode) -> Float[Tensor, "rows writes"]:
        """Packed writes in normalised space."""
        y = self.bias.expand(code.num_rows, -1)
        for weights, layout in zip(self.weights, self._layout, strict=True):
            y = layout.add(y, self._decode_group(code, weights, layout))
        return y

    # -- normaliser, gate, threshold --------------------------------------------------------------------------------

    def normalise(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """`x̃` of rows packed over all sources; the rows themselves once the normaliser is folded in."""
        self._check_width(x, self.sources, "sources")
        return x if self.folded_normaliser else (x - self.mean) * self._scale_columns(self.sources)

    def set_normaliser(self, mean: Float[Tensor, "width"], scale: Float[Tensor, "sources"]) -> None:
        """Fix `μ` and `c`; to be called before training."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    @torch.no_grad()
    def refresh_gate(self) -> None:
        """Set the gate to `Σ_s ‖d_i^s‖` of the present decoder; the trainer calls it after every update."""
        for weights, layout in zip(self.weights, self._layout, strict=True):
            weights.gate.copy_(layout.norms(weights.decoder).sum(1))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ reads"]]) -> None:
        """Set the threshold to the score that `k` latents per row exceed on average over `batches` (raw packed reads).

        Of each batch the 2k largest scores per row are held, which suffices unless batches differ wildly in density.
        """
        if not isinstance(self.nonlinearity, BatchTopK):
            return
        was_training, rows, scores = self.training, 0, list[Tensor]()
        self.train()
        try:
            for x in batches:
                code = self.encode_normalised(self._normalised_reads(x), k=2 * self.nonlinearity.k)
                scores.append(code.values * self.gate[code.latents])
                rows += code.num_rows
        finally:
            self.train(was_training)
        if not rows:
            raise TextError("expected rows to calibrate on; got none.", hint="Give some training rows.")
        pooled = torch.cat(scores).sort(descending=True).values
        count = self.nonlinearity.k * rows
        cut = pooled[count - 1 : count + 1].mean() if pooled.numel() > count else pooled.new_zeros(())
        for weights in self.weights:
            weights.threshold.copy_(cut)

    def group_write_widths(self, group: int) -> tuple[int, ...]:
        """Widths of the sources that a group writes, in the order of its decoder's columns."""
        return self._layout[group].widths

    def group_parts(self, latents: Int[Tensor, "some"]) -> list[GroupPart]:
        """The weights of `latents` (sorted), group by group, for work on a few latents only; empty parts left out."""
        parts = [layout.part(weights, latents) for weights, layout in zip(self.weights, self._layout, strict=True)]
        return [part for part in parts if part.bias.shape[0]]

    # -- norms, folding, files --------------------------------------------------------------------------------------

    def decoder_norms(self, space: Space = "normalised") -> Float[Tensor, "latents sources"]:
        """`‖W_dec[i, s]‖₂` for every written source, in the declared space; 0 where a latent cannot write."""
        norms = self.bias.new_zeros(self.num_latents, len(self.writes))
        for weights, layout in zip(self.weights, self._layout, strict=True):
            norms[layout.first : layout.last, layout.source_ids] = layout.norms(weights.decoder)
        return norms * self._to_space(space)

    def decoder_rows(self, source: str, space: Space = "normalised") -> Float[Tensor, "latents width"]:
        """The decoder vectors of all latents at one written source; zero where a latent cannot write it."""
        rows = self.bias.new_zeros(self.num_latents, self.writes[source].width)
        for weights, layout in zip(self.weights, self._layout, strict=True):
            if source in layout.group.writes:
                rows[layout.first : layout.last] = weights.decoder[:, layout.write_slices[source]]
        return rows * self._to_space(space)[self.writes.index(source)]

    def folded(self) -> Self:
        """The same function with the normaliser moved into the weights; for inference."""
        if self.folded_normaliser:
            return deepcopy(self)
        copy = deepcopy(self)
        with torch.no_grad():
            scale_r, mean_r = self._scale_columns(self.reads), self.mean[self._columns(self.reads)]
            for mine, layout in zip(copy.weights, self._layout, strict=True):
                mine.encoder.mul_(layout.read(scale_r))
                mine.encoder_bias.sub_(mine.encoder @ layout.read(mean_r))
                mine.decoder.div_(layout.written(self._scale_columns(self.writes)))
            copy.bias.div_(self._scale_columns(self.writes)).add_(self.mean[self._columns(self.writes)])
        copy.folded_normaliser = True
        return copy.eval()

    def save(self, path: str | Path) -> Path:
        """Write `config.json`, `model.safetensors` and a model card into the directory `path`."""
        return crosscoder_files.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None, device: str = "cpu") -> Crosscoder:
        """A saved crosscoder, in eval mode, from a directory or a Hub id.

        Raises FileFormatError for files that are missing, truncated, foreign or newer.
        """
        return crosscoder_files.load(path, revision=revision, device=device)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload what `save` writes to the Hub as `repo_id`; gives the address of the commit."""
        return crosscoder_files.push(self, repo_id, private=private)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _normalised_reads(self, x: Tensor) -> Tensor:
        if self.folded_normaliser:
            return x
        return (x - self.mean[self._columns(self.reads)]) * self._scale_columns(self.reads)

    def _encode_dense(self, parts: Sequence[Tensor]) -> SparseCode:
        return SparseCode.from_dense(torch.relu(self._dense_block(parts)))

    def _dense_block(self, parts: Sequence[Tensor]) -> Tensor:
        products = [torch.addmm(w.encoder_bias, part, w.encoder.T) for w, part in zip(self.weights, parts, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def _select(self, parts: Sequence[Tensor], k: int | None) -> selection.Selection:
        def block(first: int, last: int) -> Tensor:
            return self._dense_block([part[first:last] for part in parts])

        num_rows, gate, kind = parts[0].shape[0], self.gate, self.nonlinearity
        assert not isinstance(kind, ReLU), "ReLU is computed densely"
        if isinstance(kind, TopK):
            return selection.top_k(block, num_rows=num_rows, gate=gate, k=k or kind.k)
        if self.training:
            return selection.batch_top_k(block, num_rows=num_rows, gate=gate, k=k or kind.k)
        return selection.above_threshold(block, num_rows=num_rows, gate=gate, threshold=self.thresholds)

    def _attach(self, parts: Sequence[Tensor], found: selection.Selection, pattern: Pattern) -> Tensor:
        """The found values with their graph: the sparse backward of each group's encoder."""
        if len(self.weights) == 1:
            w = self.weights[0]
            return sparse.encode(parts[0], w.encoder, w.encoder_bias, values=found.values, pattern=pattern)
        values = torch.zeros_like(found.values)
        for weights, part, layout in zip(self.weights, parts, self._layout, strict=True):
            of_group = layout.pairs(found.latents)
            own = layout.pattern(found.rows[of_group], found.latents[of_group], num_rows=part.shape[0])
            mine = sparse.encode(
                part, weights.encoder, weights.encoder_bias, values=found.values[of_group], pattern=own
            )
            values = values.index_put((of_group,), mine)
        return values

    def _decode_group(self, code: SparseCode, weights: GroupWeights, layout: GroupLayout) -> Tensor:
        own = code if len(self.weights) == 1 else code.of_latents(layout.first, layout.last)
        if dispatch.dense(self.nonlinearity):
            return reference.decode(own.to_dense(), weights.decoder)
        return sparse.decode(own.values, weights.decoder, own.pattern)

    def _to_space(self, space: Space) -> Tensor:
        """What turns stored norms at the written sources into norms of `space`."""
        scale = self.scale[[self.sources.index(key) for key in self.writes.keys]]
        stored: Space = "raw" if self.folded_normaliser else "normalised"
        if space == stored:
            return torch.ones_like(scale)
        return scale if space == "normalised" else 1 / scale

    def _columns(self, sources: SourceSet) -> slice | Int[Tensor, "columns"]:
        if sources == self.sources:
            return slice(None)
        return torch.tensor(self.sources.columns(sources.keys), device=self.mean.device)

    def _scale_columns(self, sources: SourceSet) -> Float[Tensor, "width"]:
        """`c_s` repeated over the columns of each source."""
        ids = torch.tensor([self.sources.index(key) for key in sources.keys], device=self.scale.device)
        widths = torch.tensor(sources.widths, device=self.scale.device)
        return self.scale[ids].repeat_interleave(widths, output_size=sources.width)

    def _check_width(self, x: Tensor, sources: SourceSet, side: str) -> None:
        if x.ndim != 2 or x.shape[1] != sources.width:
            raise SourceMismatch(
                f"this crosscoder {side}: {len(sources)} sources, {sources.width} columns; got shape {tuple(x.shape)}.",
                details=sources.describe(),
                hint="Pack one row per token with crosscoder.reads.pack({key: activations}).",
            )


def _new_weights(group: LatentGroup, draw: Callable[..., Tensor]) -> GroupWeights:
    decoder = draw(group, keys=group.writes)
    return GroupWeights(decoder.clone() if group.reads == group.writes else draw(group, keys=group.reads), decoder)


def _refuse_unbuilt(groups: Sequence[LatentGroup]) -> None:
    for group in groups:
        asked = {"tied": group.tied is not None, "skip": group.skip, "k": group.k is not None}
        if any(asked.values()) or group.penalty != 1.0:
            raise WiringError(
                f"group {group.name!r} asks for what this version describes and saves, but does not train.",
                details=[name for name, on in {**asked, "penalty": group.penalty != 1.0}.items() if on],
                hint="Leave these at their defaults.",
            )
