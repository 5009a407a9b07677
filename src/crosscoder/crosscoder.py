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
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoder import calibration, crosscoder_files, folding, initialisation, nonlinearities
from crosscoder.activity import Activity
from crosscoder.codes import SparseCode
from crosscoder.errors import NotCalibrated, SourceMismatch
from crosscoder.groups import Columns, GroupLayout, GroupPart, GroupWeights, assemble, code_norm
from crosscoder.kernels import dispatch, reference, selection, sparse
from crosscoder.kernels.candidates import Encoding
from crosscoder.kernels.cuts import Cut
from crosscoder.kernels.dispatch import Kernels, Precision
from crosscoder.kernels.jump_relu import jump_relu
from crosscoder.kernels.operations import Backend
from crosscoder.kernels.sparse import Decoding, Fit
from crosscoder.nonlinearities import BatchTopK, Budget, CodeNorm, JumpReLU, Nonlinearity, ReLU, TopK, active_per_row
from crosscoder.sources import SourceSet
from crosscoder.wiring import Wiring

Space = Literal["normalised", "raw"]


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
        self.cuts = [Cut() for _ in self.budgets or ("thresholds",)]
        """Where the selections of training ended last, by budget; what the next one starts from."""
        self._eval_cuts = deepcopy(self.cuts)
        self.precision: Precision = "auto"
        """Whether bf16 products may propose the pairs that fp32 decides on; codes are the same either way."""
        self.kernels: Kernels = "auto"
        """Which kernels run; codes and gradients are the same either way."""
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
        self._columns_by_keys: dict[tuple[str, ...], Columns] = {}
        self._source_of_column: Tensor
        owners = torch.arange(len(wiring.sources)).repeat_interleave(torch.tensor(wiring.sources.widths))
        self.register_buffer("_source_of_column", owners, persistent=False)
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

    @property
    def backend(self) -> Backend:
        """The kernels that run where the weights are."""
        return dispatch.backend(self.bias, self.kernels)

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
        if isinstance(code, SparseCode) and dispatch.dense(code.l0 / self.num_latents):
            code = code.to_dense()
        if isinstance(code, Tensor):
            y = self._decoded_densely(code)
        else:
            parts = code.split([group.num_latents for group in self.wiring])
            y = sparse.decode(self._decodings(parts), self.bias, num_rows=code.num_rows)
        skipped = self._skipped(x)
        return y if skipped is None else y + skipped

    def activity(self, x: Float[Tensor, "rows reads"], *, k: int | None = None) -> Activity:
        """The code of packed normalised reads, with what training needs beside it."""
        reads = [layout.read(x) for layout in self.layouts]
        encodings = self._encodings(reads)
        thresholded = isinstance(self.nonlinearity, ReLU | JumpReLU)
        if thresholded and self.training and dispatch.dense(selection.share_above(encodings, self._support())):
            pre = torch.cat([torch.addmm(e.bias, e.x, e.encoder.T) for e in encodings], dim=1)
            return Activity(reads, (), self._active(pre, self._jumps()), [pre])
        with torch.no_grad():
            found = self._select(encodings, k)
        groups = list(zip(encodings, found, self.weights, strict=True))
        ops = self.backend.operations
        codes = [
            sparse.encode(e.x, e.encoder, e.bias, code=code, spares=w.spares, operations=ops) for e, code, w in groups
        ]
        if not thresholded:
            return Activity(reads, codes)
        active = [self._active_pairs(code, weights) for code, weights in zip(codes, self.weights, strict=True)]
        return Activity(reads, active, pre=[code.values for code in codes])

    def fit(self, activity: Activity, x: Float[Tensor, "rows reads"], target: Float[Tensor, "rows writes"]) -> Fit:
        """How far the reconstruction of an activity is from packed normalised writes; `x` as in `decode`."""
        if activity.f is not None:
            error = target - self.decode_normalised(activity.f, x)
            source_errors = sparse.squared_errors(error, self.writes.widths)
            return Fit(error, source_errors.sum(), source_errors.detach())
        skipped = self._skipped(x)
        target = target if skipped is None else target - skipped
        return sparse.fit(self._decodings(activity.groups), self.bias, target=target, widths=self.writes.widths)

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
    def settle(self, squared_norms: Sequence[Float[Tensor, "_ _"]] | None = None) -> None:
        """Restore after an update what it may have broken: norms that are tied, and the gate.

        `squared_norms` of each group's stored decoder rows, by source, save a look at the decoders.
        """
        for weights, layout in zip(self.weights, self.layouts, strict=True):
            layout.equalise(weights.decoder)
        self.refresh_gate(squared_norms)

    @torch.no_grad()
    def refresh_gate(self, squared_norms: Sequence[Float[Tensor, "_ _"]] | None = None) -> None:
        """Set the gate to the code norm of the present decoder; `squared_norms` as in `settle`."""
        for i, (weights, layout) in enumerate(zip(self.weights, self.layouts, strict=True)):
            if squared_norms is None or layout.group.tied == "norm":
                norms = layout.norms(weights.decoder)
            else:
                norms = squared_norms[i].sqrt().expand(-1, len(layout.widths))
            weights.gate.copy_(code_norm(norms, self.nonlinearity.code_norm))

    def spend_gradients(self) -> None:
        """Forget all gradients, as `zero_grad` does, and keep the memory of the large ones for the next."""
        for weights in self.weights:
            weights.spend_gradients()
        self.bias.grad = None

    def drop_spares(self) -> None:
        """Let go of the memory of spent gradients, when training is over."""
        for weights in self.weights:
            weights.spares.clear()

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
        return self.scale[self._columns(sources)(self._source_of_column)]

    def mean_columns(self, sources: SourceSet) -> Float[Tensor, "width"]:
        """`μ` over the columns of `sources`."""
        return self._columns(sources)(self.mean)

    def _columns(self, sources: SourceSet) -> Columns:
        if sources.keys not in self._columns_by_keys:
            self._columns_by_keys[sources.keys] = Columns(self.sources, sources.keys)
        return self._columns_by_keys[sources.keys]

    def _encodings(self, parts: Sequence[Tensor]) -> list[Encoding]:
        gated = isinstance(self.nonlinearity, TopK | BatchTopK)
        return [
            Encoding(
                x,
                w.encoder,
                w.encoder_bias,
                w.gate if gated else torch.ones_like(w.gate),
                w.rounded_encoder if dispatch.proposes(x, w.encoder, self.precision) else None,
            )
            for x, w in zip(parts, self.weights, strict=True)
        ]

    def _jumps(self) -> Tensor | None:
        return self.thresholds if isinstance(self.nonlinearity, JumpReLU) else None

    def _support(self) -> list[Tensor]:
        """What the score of a pair must exceed to be kept, group by group; in train mode with JumpReLU's windows."""
        kind, sizes = self.nonlinearity, [group.num_latents for group in self.wiring]
        if isinstance(kind, ReLU):
            return list(torch.zeros_like(self.gate).split(sizes))
        margin = kind.bandwidth / 2 if isinstance(kind, JumpReLU) and self.training else 0.0
        return list((self.thresholds.detach() - margin).split(sizes))

    def _active(self, pre: Tensor, jumps: Tensor | None) -> Tensor:
        if jumps is None:
            return torch.relu(pre)
        assert isinstance(self.nonlinearity, JumpReLU), "nothing else has jumps"
        return jump_relu(pre, jumps, bandwidth=self.nonlinearity.bandwidth)

    def _select(self, encodings: Sequence[Encoding], k: int | None) -> list[SparseCode]:
        cuts = self.cuts if self.training else self._eval_cuts
        if not isinstance(self.nonlinearity, TopK) and not (self.training and self.budgets):
            return self.backend.selections.above_threshold(encodings, self._support(), cuts[0])
        selections = self.backend.selections
        pick = selections.top_k if isinstance(self.nonlinearity, TopK) else selections.batch_top_k
        budgets = self.budgets if k is None else nonlinearities.scaled(self.budgets, k)
        found: dict[int, SparseCode] = {}
        for budget, cut in zip(budgets, cuts, strict=True):
            codes = pick([encodings[i] for i in budget.groups], budget.k, cut)
            found |= dict(zip(budget.groups, codes, strict=True))
        return [found[i] for i in range(len(encodings))]

    def _active_pairs(self, code: SparseCode, weights: GroupWeights) -> SparseCode:
        """The code of pairs of which the pre-activations are known."""
        jumps = None if weights.log_threshold is None else weights.log_threshold.exp()[code.latents]
        return SparseCode.of(code.pattern, self._active(code.values, jumps))

    def _decodings(self, codes: Sequence[SparseCode]) -> list[Decoding]:
        groups = zip(codes, self.weights, self.layouts, strict=True)
        ops = self.backend.operations
        return [Decoding(code, weights.decoder, layout, weights.spares, ops) for code, weights, layout in groups]

    def _decoded_densely(self, f: Tensor) -> Tensor:
        start = self.bias.expand(f.shape[0], -1).split(list(self.writes.widths), dim=1)
        groups = list(zip(self.weights, self.layouts, strict=True))
        parts = [(layout, reference.decode(f[:, layout.first : layout.last], w.decoder)) for w, layout in groups]
        return assemble(start, [piece for layout, part in parts for piece in layout.pieces(part)])

    def _skipped(self, x: Tensor | None) -> Tensor | None:
        """What the affine paths add to the packed writes, if there are any."""
        paths = [(w, layout) for w, layout in zip(self.weights, self.layouts, strict=True) if w.skip is not None]
        if not paths:
            return None
        if x is None:
            raise SourceMismatch(
                "this crosscoder has affine paths from its reads to its writes; a code alone does not give them.",
                details=[f"{layout.group.name}  reads {', '.join(layout.group.reads)}" for _, layout in paths],
                hint="Call decode(code, x) with the packed reads that were encoded.",
            )
        start = x.new_zeros(()).expand(x.shape[0], self.writes.width).split(list(self.writes.widths), dim=1)
        return assemble(start, [piece for weights, layout in paths for piece in layout.skip_pieces(weights, x)])

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
