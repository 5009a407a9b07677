"""Norm profiles: at which of several sources a latent writes, how strongly, and in which direction.

With `n_i^s = ‖d_i^s‖` at written source s

    profile_i^s   = n_i^s / max_t n_i^t              peak_i = argmax_s n_i^s (the first of equals)
    span_i        = |{s : profile_i^s >= cut}|       cos_i^s = cos(d_i^peak, d_i^s)
    C_st          = mean over latents with norms above zero at both of cos(d_i^s, d_i^t)

Lindsey et al. 2024 (profiles, peak layer, the matrix of cosines). Norms are of a stated space, since sources differ in
scale; cosines are the same in both spaces, which differ by one number per source. Where a latent cannot write, or two
widths differ, there is no number: NaN in tensors, null in tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from crosscoder.crosscoder import Crosscoder, Space
from crosscoder.errors import SourceMismatch

SPAN_CUT = 0.3
"""Of the peak's norm: what counts as written, unless another is given."""
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class NormProfiles:
    """Where every latent writes; a latent with no norm anywhere has the peak −1 and the span 0.

    `mean_cosine` is over `num_latents_both` latents; `no_cosine` says for which pairs there is none, and why.
    """

    sources: tuple[str, ...]
    space: Space
    cut: float
    norms: Float[Tensor, "latents sources"]
    profile: Float[Tensor, "latents sources"]
    peak: Int[Tensor, "latents"]
    span: Int[Tensor, "latents"]
    cosine_to_peak: Float[Tensor, "latents sources"]
    mean_cosine: Float[Tensor, "sources sources"]
    num_latents_both: Int[Tensor, "sources sources"]
    no_cosine: dict[tuple[str, str], str]

    def table(self) -> pa.Table:
        """One row per latent: peak, span, and norm, profile and cosine to the peak at every source."""
        peaks = [self.sources[place] if place >= 0 else None for place in self.peak.tolist()]
        columns: dict[str, Any] = {
            "latent": pa.array(range(len(self.peak)), pa.int32()),
            "peak": pa.array(peaks, pa.string()),
            "span": pa.array(self.span.tolist(), pa.int32()),
        }
        parts = {f"norm_{self.space}": self.norms, "profile": self.profile, "cosine_to_peak": self.cosine_to_peak}
        for name, values in parts.items():
            for key, column in zip(self.sources, values.float().T, strict=True):
                columns[f"{name}/{key}"] = pa.array(column.numpy(), from_pandas=True)
        return pa.table(columns)

    def to_json(self) -> dict[str, Any]:
        """The matrix of cosines, and how many latents have each peak and each span."""
        writing = self.peak >= 0
        by_peak = torch.bincount(self.peak[writing], minlength=len(self.sources)).tolist()
        return {
            "sources": list(self.sources),
            "space": self.space,
            "cut": self.cut,
            "num_latents_by_peak": dict(zip(self.sources, by_peak, strict=True)),
            "num_latents_by_span": torch.bincount(self.span, minlength=len(self.sources) + 1).tolist(),
            "mean_cosine": _rows_or_none(self.mean_cosine),
            "num_latents_both": self.num_latents_both.tolist(),
            "no_cosine": [{"pair": list(pair), "reason": reason} for pair, reason in self.no_cosine.items()],
        }


@torch.no_grad()
def norm_profiles(crosscoder: Crosscoder, *, space: Space = "normalised", cut: float = SPAN_CUT) -> NormProfiles:
    """Profiles of all latents over the written sources, of which there must be two or more."""
    _check(crosscoder)
    writes = torch.from_numpy(crosscoder.wiring.writes_mask)
    norms = crosscoder.decoder_norms(space).cpu()
    top = norms.amax(1)
    profile = torch.where(writes, norms / top[:, None].clamp(min=torch.finfo(norms.dtype).tiny), torch.nan)
    peak = torch.where(top > 0, norms.argmax(1), -1)
    to_peak = torch.full_like(norms, torch.nan)
    total = torch.zeros(len(crosscoder.writes), len(crosscoder.writes), dtype=torch.float64)
    both = torch.zeros_like(total, dtype=torch.int64)
    for latents, cosines in _cosine_blocks(crosscoder, torch.arange(crosscoder.num_latents)):
        total += cosines.nan_to_num().double().sum(0)
        both += (~cosines.isnan()).sum(0)
        to_peak[latents] = cosines[torch.arange(len(latents)), peak[latents].clamp(min=0)]
    return NormProfiles(
        sources=crosscoder.writes.keys,
        space=space,
        cut=cut,
        norms=torch.where(writes, norms, torch.nan),
        profile=profile,
        peak=peak,
        span=(profile >= cut).sum(1) * (top > 0),
        cosine_to_peak=to_peak,
        mean_cosine=(total / both).float(),
        num_latents_both=both,
        no_cosine=_without_cosine(crosscoder),
    )


@torch.no_grad()
def cosine_matrices(crosscoder: Crosscoder, latents: Sequence[int]) -> Float[Tensor, "some sources sources"]:
    """`cos(d_i^s, d_i^t)` of chosen latents; NaN where one of the two is not written, zero, or of another width."""
    _check(crosscoder)
    chosen = torch.tensor(list(latents), dtype=torch.int64)
    wrong = chosen[(chosen < 0) | (chosen >= crosscoder.num_latents)].tolist()
    if wrong:
        raise SourceMismatch(f"this crosscoder has latents 0 to {crosscoder.num_latents - 1}; got {wrong[0]}.")
    found = chosen.new_empty(0, len(crosscoder.writes), len(crosscoder.writes)).to(crosscoder.bias.dtype)
    return torch.cat([found, *(cosines for _, cosines in _cosine_blocks(crosscoder, chosen))])


def _check(crosscoder: Crosscoder) -> None:
    if len(crosscoder.writes) < 2:
        raise SourceMismatch(
            "a profile is over two written sources or more; this crosscoder writes one.",
            details=crosscoder.writes.describe(),
        )


def _cosine_blocks(crosscoder: Crosscoder, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents some at a time, with their cosines (some, sources, sources); in the order given."""
    widths = torch.tensor(crosscoder.writes.widths)
    comparable = widths[:, None] == widths
    step = max(1, _BLOCK_ELEMENTS // (len(widths) * int(widths.max())))
    for block in latents.split(step):
        rows = _decoder_rows(crosscoder, block)
        there = rows.norm(dim=2) > 0
        unit = normalize(rows, dim=2, eps=torch.finfo(rows.dtype).tiny)
        cosines = (unit @ unit.transpose(1, 2)).clamp(-1, 1)
        yield block, torch.where(there[:, :, None] & there[:, None, :] & comparable, cosines, torch.nan)


def _decoder_rows(crosscoder: Crosscoder, latents: Tensor) -> Float[Tensor, "some sources width"]:
    """Decoder vectors of some latents in the stored space, padded to the largest width; zero where none is."""
    width = max(crosscoder.writes.widths)
    rows = torch.zeros(len(latents), len(crosscoder.writes), width, dtype=crosscoder.bias.dtype)
    for weights, layout in zip(crosscoder.weights, crosscoder.layouts, strict=True):
        here = ((latents >= layout.first) & (latents < layout.last)).nonzero().squeeze(1)
        own = (latents[here] - layout.first).to(weights.decoder.device)
        parts = layout.expanded(weights.decoder[own]).cpu().split(list(layout.widths), dim=1)
        for source, part in zip(layout.source_ids, parts, strict=True):
            rows[here, source] = pad(part, (0, width - part.shape[1]))
    return rows


def _without_cosine(crosscoder: Crosscoder) -> dict[tuple[str, str], str]:
    sources = list(crosscoder.writes)
    together = torch.from_numpy(crosscoder.wiring.writes_mask).int()
    found: dict[tuple[str, str], str] = {}
    for i, s in enumerate(sources):
        for j, t in enumerate(sources[:i]):
            if s.width != t.width:
                found[t.key, s.key] = f"widths {t.width} and {s.width} differ"
            elif not bool((together[:, i] & together[:, j]).any()):
                found[t.key, s.key] = "no latent writes both"
    return found


def _rows_or_none(matrix: Float[Tensor, "sources sources"]) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in matrix.tolist()]
