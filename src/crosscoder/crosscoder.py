"""Crosscoder: sparse latents that read and write several sources at once.

Raw activations `x` are packed, `x̃_s = (x_s − μ_s) · c_s` is stored with the weights, and for every latent group g

    p_g = x̃[:, R_g] W_enc_gᵀ + b_enc_g       f = nonlinearity(p, gate)       x̂̃[:, W_g] += f_g W_dec_g     (+ b_dec)

and, where a group has an affine path, `x̂̃[:, K_g] += x̃[:, R_g] W_skip_gᵀ`. The gate of latent i is the code norm of its
decoder in normalised space, by default `Σ_s ‖d_i^s‖`. Folding: `folding.py`; thresholds: `calibration.py`.
Sources: Lindsey et al. 2024 (crosscoder), Minder et al. 2025 (selection on decoder-norm scores), Dunefsky et al. 2024
and Paulo et al. 2025 (transcoders, affine skip).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoder import calibration, crosscoder_files, folding, initialisation, nonlinearities
from crosscoder.codes import Pattern, SparseCode, pointers
from crosscoder.errors import NotCalibrated, SourceMismatch
from crosscoder.groups import GroupLayout, GroupPart, GroupWeights, assemble, code_norm
from crosscoder.kernels import dispatch, reference, selection, sparse
from crosscoder.kernels.jump_relu import jump_relu
from crosscoder.nonlinearities import BatchTopK, Budget, CodeNorm, JumpReLU, Nonlinearity, ReLU, TopK, active_per_row
from crosscoder.sources import SourceSet
from crosscoder.wiring import Wiring

Space = Literal["normalised", "raw"]


@dataclass(frozen=True)
class Activity:
    """A code as a training step needs it; where codes are computed densely, with `f` and the pre-activations `p`."""

    code: SparseCode
    f: Float[Tensor, "rows latents"] | None = None
    pre: Float[Tensor, "rows latents"] | None = None


class Crosscoder(nn.Module):
    """A sparse dictionary over several sources; `encode` takes raw packed reads, `decode` gives raw packed writes.

    In train mode BatchTopK selects over the batch; in eval mode it uses the calibrated threshold. Raises WiringError
    for groups that the nonlinearity cannot serve: a penalty under TopK, a k that does not fit. Initial weights depend
    on the seed and the group alone; `seed=None` leaves them zero, to be set.
    """

    def __init__(
        self,
        wiring: Wiring,
        nonlinearity: Nonlinearity,
        *,
        seed: int | None = 0,
        decoder_norm: float = 0.3,
        across_sources: initialisation.Across = "same",
    ) -> None:
        super().__init__()
        nonlinearities.check(wiring, nonlinearity)
        self.wiring = wiring
        self.nonlinearity = nonlinearity
        k = active_per_row(nonlinearity)
        self.budgets: list[Budget] = [] if k is None else nonlinearities.budgets(wiring, k)
        self.provenance: dict[str, Any] = {}
        self.folded_normaliser = False
        self.layouts = [GroupLayout(group, wiring) for group in wiring]
        draw = partial(
            initialisation.weights,
            sources=wiring.sources,
            seed=seed,
            decoder_norm=decoder_norm,
            across_sources=across_sources,
        )
        log_threshold = initialisation.log_threshold(nonlinearity)
        self.weights = [layout.new_weights(*draw(layout.group), log_threshold=log_threshold) for layout in self.layouts]
        """The groups' parameters, in the wiring's order."""
        self.groups = nn.ModuleList(self.weights)
        self.bias = nn.Parameter(torch.zeros(wiring.writes.width))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(wiring.sources.width))
        self.register_buffer("scale", torch.ones(len(wiring.sources)))
        self.settle()

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
    def gate(self) -> Float[Tensor, "latents"]:
        """One number per latent that selection is made on: score = f · gate."""
        return torch.cat([group.gate for group in self.weights])

    @property
    def thresholds(self) -> Float[Tensor, "latents"]:
        """What each latent must exceed at inference: its pre-activation under JumpReLU, its score under BatchTopK.

        Raises NotCalibrated where BatchTopK has none yet, and for nonlinearities that have none.
        """
        jumps: list[Tensor] = [g.log_threshold for g in self.weights if g.log_threshold is not None]
        if jumps:
            return torch.cat(jumps).exp()
        if not isinstance(self.nonlinearity, BatchTopK):
            raise NotCalibrated(f"{self.nonlinearity.kind} has no thresholds.", hint="BatchTopK and JumpReLU have.")
        thresholds = torch.cat([group.threshold.expand(group.gate.shape) for group in self.weights])
        if thresholds.isnan().any():
            raise NotCalibrated(
                "this BatchTopK crosscoder has no threshold, which it needs to encode in eval mode.",
                hint="Call crosscoder.calibrate(batches) on some training rows, or encode in train mode "
                "(selection over the batch).",
            )
        return thresholds

    def forward(self, x: Float[Tensor, "rows reads"]) -> Float[Tensor, "rows writes"]:
        """Raw packed reads to raw packed reconstructions."""
        return self.decode(self.encode(x), x)

    def encode(self, x: Float[Tensor, "rows reads"]) -> SparseCode:
        """The code of raw packed reads; raises SourceMismatch for another width, NotCalibrated as `thresholds` does."""
        self._check_width(x, self.reads, "reads")
        return self.encode_normalised(self.normalise_reads(x.to(self.bias.dtype)))

    def decode(self, code: SparseCode, x: Float[Tensor, "rows reads"] | None = None) -> Float[Tensor, "rows writes"]:
        """Raw packed writes of a code; affine paths need the raw reads `x` too, and raise SourceMismatch without."""
        if x is not None:
            self._check_width(x, self.reads, "reads")
            x = self.normalise_reads(x.to(self.bias.dtype))
        y = self.decode_normalised(code, x)
        if self.folded_normaliser:
            return y
        return y / self.scale_columns(self.writes) + self.mean_columns(self.writes)

    def encode_normalised(self, x: Float[Tensor, "rows reads"], *, k: int | None = None) -> SparseCode:
        """The code of packed reads in normalised space; `k` stands in for the nonlinearity's own (a schedule's)."""
        return self.activity(x, k=k).code

    def decode_normalised(
        self, code: SparseCode | Float[Tensor, "rows latents"], x: Float[Tensor, "rows reads"] | None = None
    ) -> Float[Tensor, "rows writes"]:
        """Packed writes in normalised space, of a code or of a full matrix of values; `x` as in `decode`."""
        num_rows = code.num_rows if isinstance(code, SparseCode) else code.shape[0]
        start = self.bias.expand(num_rows, -1).split(list(self.writes.widths), dim=1)
        return assemble(start, [*self._decoded(code), *self._skipped(x)])

    def activity(self, x: Float[Tensor, "rows reads"], *, k: int | None = None) -> Activity:
        """The code of packed normalised reads, with what training needs beside it."""
        parts = [layout.read(x) for layout in self.layouts]
        if dispatch.dense(self.nonlinearity, training=self.training):
            pre = self._block(parts, range(len(parts)), 0, x.shape[0])
            f = torch.relu(pre) if isinstance(self.nonlinearity, ReLU) else self._jumped(pre)
            return Activity(SparseCode.from_dense(f), f, pre)
        with torch.no_grad():
            found = self._select(parts, k)
        pattern = Pattern(pointers(found.rows, num_rows=x.shape[0]), found.latents, self.num_latents)
        return Activity(SparseCode.of(pattern, self._attach(parts, found, pattern)))

    def normalise(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """`x̃` of rows packed over all sources; the rows themselves once the normaliser is folded in."""
        self._check_width(x, self.sources, "sources")
        return x if self.folded_normaliser else (x - self.mean) * self.scale_columns(self.sources)

    def normalise_reads(self, x: Float[Tensor, "rows reads"]) -> Float[Tensor, "rows reads"]:
        """`x̃` of rows packed over the sources that are read."""
        return x if self.folded_normaliser else (x - self.mean_columns(self.reads)) * self.scale_columns(self.reads)

    def set_normaliser(self, mean: Float[Tensor, "width"], scale: Float[Tensor, "sources"]) -> None:
        """Fix `μ` and `c`; to be called before training."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    @torch.no_grad()
    def settle(self) -> None:
        """Restore after an update what it may have broken: norms that are tied, and the gate."""
        for weights, layout in zip(self.weights, self.layouts, strict=True):
            layout.equalise(weights.decoder)
        self.refresh_gate()

    @torch.no_grad()
    def refresh_gate(self) -> None:
        """Set the gate to the code norm of the present decoder."""
        for weights, layout in zip(self.weights, self.layouts, strict=True):
            weights.gate.copy_(code_norm(layout.norms(weights.decoder), self.nonlinearity.code_norm))

    def calibrate(self, batches: Iterable[Float[Tensor, "_ reads"]]) -> None:
        """Set BatchTopK's thresholds to the scores that k latents per row exceed on `batches` (raw packed reads)."""
        calibration.calibrate(self, batches)

    def as_jumprelu(self, *, bandwidth: float = 2.0) -> Crosscoder:
        """A calibrated BatchTopK crosscoder with a threshold for every latent: the same codes in eval mode."""
        return calibration.as_jumprelu(self, bandwidth=bandwidth)

    def group_parts(self, latents: Int[Tensor, "some"]) -> list[GroupPart]:
        """The weights of `latents` (sorted), group by group, for work on a few latents only; empty parts left out."""
        parts = [layout.part(weights, latents) for weights, layout in zip(self.weights, self.layouts, strict=True)]
        return [part for part in parts if part.bias.shape[0]]

    def code_norms(self, kind: CodeNorm = "sum") -> Float[Tensor, "latents"]:
        """The code norm of every latent in the stored space; differentiable in the decoders."""
        norms = [layout.norms(weights.decoder) for weights, layout in zip(self.weights, self.layouts, strict=True)]
        return torch.cat([code_norm(part, kind) for part in norms])

    def decoder_norms(self, space: Space = "normalised") -> Float[Tensor, "latents sources"]:
        """`‖W_dec[i, s]‖₂` for every written source, in the declared space; 0 where a latent cannot write."""
        norms = self.bias.new_zeros(self.num_latents, len(self.writes))
        for weights, layout in zip(self.weights, self.layouts, strict=True):
            norms[layout.first : layout.last, layout.source_ids] = layout.norms(weights.decoder)
        return norms * self._to_space(space)

    def decoder_rows(self, source: str, space: Space = "normalised") -> Float[Tensor, "latents width"]:
        """The decoder vectors of all latents at one written source; zero where a latent cannot write it."""
        rows = self.bias.new_zeros(self.num_latents, self.writes[source].width)
        for weights, layout in zip(self.weights, self.layouts, strict=True):
            if source in layout.write_slices:
                rows[layout.first : layout.last] = layout.expanded(weights.decoder)[:, layout.write_slices[source]]
        return rows * self._to_space(space)[self.writes.index(source)]

    def folded(self) -> Crosscoder:
        """The same function with the normaliser moved into the weights; for inference."""
        return folding.fold(self)

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

    def scale_columns(self, sources: SourceSet) -> Float[Tensor, "width"]:
        """`c_s` repeated over the columns of each of `sources`."""
        ids = torch.tensor([self.sources.index(key) for key in sources.keys], device=self.scale.device)
        widths = torch.tensor(sources.widths, device=self.scale.device)
        return self.scale[ids].repeat_interleave(widths, output_size=sources.width)

    def mean_columns(self, sources: SourceSet) -> Float[Tensor, "width"]:
        """`μ` over the columns of `sources`."""
        if sources == self.sources:
            return self.mean
        return self.mean[torch.tensor(self.sources.columns(sources.keys), device=self.mean.device)]

    def _jumped(self, pre: Tensor) -> Tensor:
        assert isinstance(self.nonlinearity, JumpReLU), "only ReLU and JumpReLU are computed densely"
        return jump_relu(pre, self.thresholds, bandwidth=self.nonlinearity.bandwidth)

    def _select(self, parts: Sequence[Tensor], k: int | None) -> selection.Selection:
        num_rows = parts[0].shape[0]
        if not self.training and not isinstance(self.nonlinearity, TopK):
            gate = torch.ones_like(self.gate) if isinstance(self.nonlinearity, JumpReLU) else self.gate
            block = partial(self._block, parts, range(len(parts)))
            return selection.above_threshold(block, num_rows=num_rows, gate=gate, threshold=self.thresholds)
        pick = selection.top_k if isinstance(self.nonlinearity, TopK) else selection.batch_top_k
        picked: list[selection.Selection] = []
        for budget in self.budgets if k is None else nonlinearities.scaled(self.budgets, k):
            block = partial(self._block, parts, budget.groups)
            gate = torch.cat([self.weights[i].gate for i in budget.groups])
            found = pick(block, num_rows=num_rows, gate=gate, k=budget.k)
            picked.append(found if len(self.budgets) == 1 else found.renumbered(self._latents_of(budget)))
        return picked[0] if len(picked) == 1 else selection.merged(picked, num_latents=self.num_latents)

    def _block(self, parts: Sequence[Tensor], groups: Sequence[int], first: int, last: int) -> Tensor:
        """Pre-activations of some rows in some groups."""
        weights = self.weights
        products = [torch.addmm(weights[i].encoder_bias, parts[i][first:last], weights[i].encoder.T) for i in groups]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def _latents_of(self, budget: Budget) -> Int[Tensor, "latents"]:
        ranges = [self.wiring.latent_ranges[i] for i in budget.groups]
        return torch.cat([torch.arange(first, last, device=self.bias.device) for first, last in ranges])

    def _attach(self, parts: Sequence[Tensor], found: selection.Selection, pattern: Pattern) -> Tensor:
        """The found values with their graph: the sparse backward of each group's encoder."""
        if len(self.weights) == 1:
            w = self.weights[0]
            return sparse.encode(parts[0], w.encoder, w.encoder_bias, values=found.values, pattern=pattern)
        values = torch.zeros_like(found.values)
        for weights, part, layout in zip(self.weights, parts, self.layouts, strict=True):
            of_group = layout.pairs(found.latents)
            own = layout.pattern(found.rows[of_group], found.latents[of_group], num_rows=part.shape[0])
            mine = sparse.encode(
                part, weights.encoder, weights.encoder_bias, values=found.values[of_group], pattern=own
            )
            values = values.index_put((of_group,), mine)
        return values

    def _decoded(self, code: SparseCode | Tensor) -> Iterable[tuple[int, Tensor]]:
        for weights, layout in zip(self.weights, self.layouts, strict=True):
            yield from layout.pieces(self._decode_group(code, weights, layout))

    def _decode_group(self, code: SparseCode | Tensor, weights: GroupWeights, layout: GroupLayout) -> Tensor:
        if isinstance(code, Tensor):
            return reference.decode(code[:, layout.first : layout.last], weights.decoder)
        own = code if len(self.weights) == 1 else code.of_latents(layout.first, layout.last)
        if dispatch.dense(self.nonlinearity, training=self.training):
            return reference.decode(own.to_dense(), weights.decoder)
        return sparse.decode(own.values, weights.decoder, own.pattern)

    def _skipped(self, x: Tensor | None) -> Iterable[tuple[int, Tensor]]:
        paths = [(w, layout) for w, layout in zip(self.weights, self.layouts, strict=True) if w.skip is not None]
        if paths and x is None:
            raise SourceMismatch(
                "this crosscoder has affine paths from its reads to its writes; a code alone does not give them.",
                details=[f"{layout.group.name}  reads {', '.join(layout.group.reads)}" for _, layout in paths],
                hint="Call decode(code, x) with the packed reads that were encoded.",
            )
        for weights, layout in paths:
            assert x is not None, "refused above"
            yield from layout.skip_pieces(weights, x)

    def _to_space(self, space: Space) -> Tensor:
        """What turns stored norms at the written sources into norms of `space`."""
        scale = self.scale[[self.sources.index(key) for key in self.writes.keys]]
        stored: Space = "raw" if self.folded_normaliser else "normalised"
        if space == stored:
            return torch.ones_like(scale)
        return scale if space == "normalised" else 1 / scale

    def _check_width(self, x: Tensor, sources: SourceSet, side: str) -> None:
        if x.ndim != 2 or x.shape[1] != sources.width:
            raise SourceMismatch(
                f"this crosscoder {side}: {len(sources)} sources, {sources.width} columns; got shape {tuple(x.shape)}.",
                details=sources.describe(),
                hint="Pack one row per token with crosscoder.reads.pack({key: activations}).",
            )
