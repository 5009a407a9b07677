"""Matches between the latents of two crosscoders of the same sources: by where they point, and by when they fire.

    by decoder      cos(d_i, d'_j), decoder rows of all written sources side by side, in normalised space
    by activation   Pearson correlation of f_i and f'_j over the same rows, zeros included

A latent's *match* is the most similar latent of the other; it is *mutual* where that one's match is this latent again,
so that mutual matches are one to one. Decoders are compared in blocks. Correlations take one pass over the rows and the
joint sum of every pair of latents, so that memory is latents × latents, whatever the number of rows: for dictionaries
too large for that, ask about some of the latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch

MAX_PAIRS = 2**27
"""Joint sums that are held at most, 8 bytes each."""
_AT_ONCE = 2**21
_BLOCK = 2048


@dataclass(frozen=True)
class LatentMatches:
    """For each of `latents` of one crosscoder its match in another; −1 and NaN where there is nothing to compare.

    A match is `mutual` among those asked about.
    """

    by: Literal["decoder", "activation"]
    latents: Int[Tensor, "some"]
    best: Int[Tensor, "some"]
    similarity: Float[Tensor, "some"]
    mutual: Bool[Tensor, "some"]

    def share_above(self, cut: float) -> float:
        """Of the latents that can be compared, those with a mutual match of at least `cut`."""
        known = self.similarity.isfinite()
        return float((self.mutual & (self.similarity >= cut))[known].double().mean()) if known.any() else float("nan")

    def table(self) -> pa.Table:
        """One row per latent."""
        return pa.table(
            {
                "latent": pa.array(self.latents.tolist(), pa.int32()),
                "best": pa.array([None if j < 0 else j for j in self.best.tolist()], pa.int32()),
                "similarity": pa.array(self.similarity.float().numpy(), from_pandas=True),
                "mutual": pa.array(self.mutual.tolist(), pa.bool_()),
            }
        )


@torch.no_grad()
def decoder_matches(crosscoder: Crosscoder, other: Crosscoder) -> LatentMatches:
    """Matches of all latents by decoder cosine; raises SourceMismatch unless both write the same sources."""
    check_same_writes(crosscoder, other)
    rows, columns = (_unit_rows(cc) for cc in (crosscoder, other))
    best = torch.zeros(len(rows), dtype=torch.int64)
    similarity = torch.zeros(len(rows), dtype=rows.dtype)
    back = torch.full((len(columns),), -torch.inf, dtype=rows.dtype)
    back_to = torch.zeros(len(columns), dtype=torch.int64)
    for first in range(0, len(rows), _BLOCK):
        cosines = rows[first : first + _BLOCK] @ columns.T
        similarity[first : first + _BLOCK], best[first : first + _BLOCK] = cosines.max(1)
        value, place = cosines.max(0)
        better = value > back
        back[better], back_to[better] = value[better], place[better] + first
    known = (rows != 0).any(1)
    everyone = torch.arange(len(rows))
    return _matches("decoder", everyone, best, similarity=similarity, back_to=back_to, known=known)


class JointSums:
    """Running sums of the codes of two crosscoders on the same rows: what correlations between them are made of."""

    def __init__(self, num_latents: tuple[int, int], latents: Int[Tensor, "some"] | None = None) -> None:
        self.latents = torch.arange(num_latents[0]) if latents is None else latents.cpu().unique()
        self._shape = (len(self.latents), num_latents[1])
        if self._shape[0] * self._shape[1] > MAX_PAIRS:
            raise ConfigError(
                f"correlating {self._shape[0]:,} latents with {self._shape[1]:,} takes {8 * self._pairs / 1e9:.1f} GB.",
                hint=f"Ask about some of the latents: at most {MAX_PAIRS // num_latents[1]:,} here.",
            )
        self._slot = torch.full((num_latents[0],), -1)
        self._slot[self.latents] = torch.arange(len(self.latents))
        self._product = torch.zeros(self._pairs, dtype=torch.float64)
        self._sums = [torch.zeros(2, size, dtype=torch.float64) for size in self._shape]  # Σ f, Σ f²
        self._num_rows = 0

    @property
    def _pairs(self) -> int:
        return self._shape[0] * self._shape[1]

    @torch.no_grad()
    def update(self, code: SparseCode, other: SparseCode) -> None:
        """Add the two codes of some rows."""
        slot = self._slot[code.latents.cpu()]
        kept = (slot >= 0).nonzero().squeeze(1)
        rows, values = code.row_ids.cpu()[kept], code.values.double().cpu()[kept]
        there, there_values = other.latents.cpu(), other.values.double().cpu()
        self._num_rows += code.num_rows
        for sums, latents, f in ((self._sums[0], slot[kept], values), (self._sums[1], there, there_values)):
            sums[0].index_add_(0, latents, f)
            sums[1].index_add_(0, latents, f.square())
        for one, two in _same_row_pairs(rows, other.row_pointers.cpu()):
            cells = slot[kept[one]] * self._shape[1] + there[two]
            self._product.index_add_(0, cells, values[one] * there_values[two])

    @property
    def correlation(self) -> Float[Tensor, "some others"]:
        """Pearson correlations so far; NaN with a latent that never varied."""
        n = max(1, self._num_rows)
        means = [sums[0] / n for sums in self._sums]
        spreads = [(s[1] / n - mean.square()).clamp(min=0).sqrt() for s, mean in zip(self._sums, means, strict=True)]
        found = self._product.view(self._shape) / n
        found.addr_(means[0], means[1], alpha=-1)
        found /= torch.where(spreads[0] > 0, spreads[0], torch.nan)[:, None]
        return found.div_(torch.where(spreads[1] > 0, spreads[1], torch.nan))

    def matches(self) -> LatentMatches:
        """Matches of the latents asked about, by correlation."""
        correlation = self.correlation
        known, there = correlation.isfinite().any(1), correlation.isfinite().any(0)
        filled = correlation.nan_to_num_(nan=-torch.inf)
        similarity, best = filled.max(1)
        back_to = torch.where(there, filled.max(0).indices, -1)
        return _matches("activation", self.latents, best, similarity=similarity, back_to=back_to, known=known)


def check_same_writes(crosscoder: Crosscoder, other: Crosscoder) -> None:
    """Raises SourceMismatch unless both write the same sources in the same order."""
    if crosscoder.writes != other.writes:
        raise SourceMismatch(
            "latents are matched between crosscoders that write the same sources.",
            details=[
                *(f"one    {line}" for line in crosscoder.writes.describe()),
                *(f"other  {line}" for line in other.writes.describe()),
            ],
        )


def _matches(
    by: Literal["decoder", "activation"],
    latents: Tensor,
    best: Tensor,
    *,
    similarity: Tensor,
    back_to: Tensor,
    known: Tensor,
) -> LatentMatches:
    mutual = (back_to[best] == torch.arange(len(latents))) & known
    best = torch.where(known, best, -1)
    return LatentMatches(by, latents, best, torch.where(known, similarity, torch.nan), mutual)


def _unit_rows(crosscoder: Crosscoder) -> Float[Tensor, "latents writes"]:
    rows = [crosscoder.decoder_rows(key).cpu() for key in crosscoder.writes.keys]
    return normalize(torch.cat(rows, dim=1), dim=1)


def _same_row_pairs(
    rows: Int[Tensor, "active"], pointers: Int[Tensor, "rows_plus_one"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For sorted `rows` and pointers into other entries: all pairs of entries of one row, some at a time."""
    number = pointers.diff()[rows]
    total = int(number.sum())
    edges = torch.searchsorted(number.cumsum(0), torch.arange(_AT_ONCE, max(_AT_ONCE, total), _AT_ONCE))
    for some in torch.arange(len(rows)).tensor_split(edges):
        own = number[some]
        one = some.repeat_interleave(own)
        offset = torch.arange(len(one)) - (own.cumsum(0) - own).repeat_interleave(own)
        yield one, pointers[rows[one]] + offset
