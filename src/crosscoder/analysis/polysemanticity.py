"""Polysemanticity: of how many kinds are the exemplars of a latent?

With unit vectors `u_e` of a latent's exemplars (`exemplar_vectors`, or any other representation)

    similarity_i   mean over pairs of its exemplars of ⟨u_e, u_e'⟩             small: they have little in common
    clusters_i     what average linkage leaves: the two clusters with the largest mean similarity are merged, again and
                   again, while it exceeds `cut`
    effective_i    1 / Σ_c (n_c / n)²                          clusters weighted by size, so that a stray counts little

`cut` is the 0.9 quantile of the similarity of exemplars of *different* latents in different contexts: two exemplars
belong together when they are more alike than most strangers. It is of these exemplars, not a number set by hand; where
more than a tenth of the strangers are of one concept, as with few latents or many copies, it is too high.

These measures compare classes of latents; they do not count meanings. A latent for one thing said in many ways has more
clusters than one for a single word. Only compare latents with equally many exemplars; those with fewer than
`min_exemplars` have no number (NaN, null).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from crosscoder.analysis.exemplars import Entries
from crosscoder.errors import TextError

STRANGERS = 0.9
"""Quantile of the similarity of exemplars of different latents, above which two belong together."""
_NUM_STRANGERS = 20_000
_BLOCK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Polysemanticity:
    """Similarity and clusters of the exemplars of each of `latents`."""

    latents: Int[Tensor, "some"]
    num_exemplars: Int[Tensor, "some"]
    similarity: Float[Tensor, "some"]
    clusters: Float[Tensor, "some"]
    effective_clusters: Float[Tensor, "some"]
    cut: float

    def table(self) -> pa.Table:
        """One row per latent."""
        numbers = {name: getattr(self, name) for name in ("similarity", "clusters", "effective_clusters")}
        return pa.table(
            {
                "latent": pa.array(self.latents.tolist(), pa.int32()),
                "num_exemplars": pa.array(self.num_exemplars.tolist(), pa.int32()),
                **{name: pa.array(values.float().numpy(), from_pandas=True) for name, values in numbers.items()},
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Medians, and how many latents have each number of clusters."""
        known = ~self.clusters.isnan()
        sizes = torch.bincount(self.clusters[known].long()).tolist()
        return {
            "cut": self.cut,
            "num_latents": int(known.sum()),
            "median_similarity": float(self.similarity[known].median()) if known.any() else None,
            "median_effective_clusters": float(self.effective_clusters[known].median()) if known.any() else None,
            "num_latents_by_clusters": sizes,
        }


def polysemanticity(
    vectors: Float[Tensor, "entries width"],
    entries: Entries,
    *,
    min_exemplars: int = 5,
    cut: float | None = None,
    seed: int = 0,
) -> Polysemanticity:
    """The clusters of every latent with exemplars among `entries`, which lie together by latent.

    Without a `cut` it is taken from strangers among these entries.
    """
    units = normalize(vectors.float(), dim=1)
    if cut is None:
        cut = strangers_cut(units, entries, seed=seed)
    starts = np.flatnonzero(np.append(True, entries.latent[1:] != entries.latent[:-1])[: len(entries.latent)])
    counts = torch.from_numpy(np.diff(np.append(starts, len(entries.latent))))
    parts = [torch.zeros(0, 3)]
    widest = int(counts.max()) if len(counts) else 1
    step = max(1, _BLOCK_ELEMENTS // (widest * units.shape[1]))
    for first in range(0, len(starts), step):
        slot = torch.from_numpy(starts[first : first + step])[:, None] + torch.arange(widest)
        there = torch.arange(widest) < counts[first : first + step, None]
        parts.append(_measures(units[slot.clamp(max=max(0, len(units) - 1))], there, cut))
    found = torch.cat(parts).double()
    found[counts < min_exemplars] = torch.nan
    return Polysemanticity(torch.from_numpy(entries.latent[starts]), counts, *found.unbind(1), cut=cut)


def strangers_cut(units: Float[Tensor, "entries width"], entries: Entries, *, seed: int = 0) -> float:
    """The quantile `STRANGERS` of the similarity of unit vectors of different latents in different contexts."""
    rng = np.random.Generator(np.random.Philox(seed))
    one, two = rng.integers(0, max(1, len(units)), (2, _NUM_STRANGERS))
    if len(units):
        apart = (entries.latent[one] != entries.latent[two]) & (entries.context[one] != entries.context[two])
        one, two = one[apart], two[apart]
    if not len(units) or not len(one):
        raise TextError(
            "how alike strangers are takes exemplars of several latents in several contexts; there are none.",
            hint="Give exemplars of more latents, or a cut of your own: cut=...",
        )
    similarity = (units[torch.from_numpy(one)] * units[torch.from_numpy(two)]).sum(1)
    return float(torch.quantile(similarity.double(), STRANGERS))


def _measures(
    units: Float[Tensor, "latents exemplars width"], there: Bool[Tensor, "latents exemplars"], cut: float
) -> Float[Tensor, "latents 3"]:
    """Similarity, clusters and effective clusters of some latents."""
    similarity = units @ units.transpose(1, 2)
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(there.shape[1], dtype=torch.bool)
    mean = (similarity * pairs).sum((1, 2)) / pairs.sum((1, 2))
    sizes = average_linkage(similarity.masked_fill(~pairs, -torch.inf), there, cut)
    shares = sizes / sizes.sum(1, keepdim=True)
    return torch.stack([mean, (sizes > 0).sum(1).float(), 1 / shares.square().sum(1)], dim=1)


def average_linkage(
    link: Float[Tensor, "latents exemplars exemplars"], there: Bool[Tensor, "latents exemplars"], cut: float
) -> Float[Tensor, "latents exemplars"]:
    """Sizes of the clusters that average linkage leaves at `cut`, 0 in emptied slots; for many latents at once.

    `link` holds similarities, −∞ on the diagonal and where there is no exemplar.
    """
    link, sizes = link.clone(), there.float()
    for _ in range(link.shape[1] - 1):
        best, place = link.flatten(1).max(1)
        rows = (best > cut).nonzero().squeeze(1)
        if not len(rows):
            break
        i, j = place[rows] // link.shape[1], place[rows] % link.shape[1]
        own, other = sizes[rows, i, None], sizes[rows, j, None]
        merged = (own * link[rows, i] + other * link[rows, j]) / (own + other)
        link[rows, i], link[rows, :, i] = merged, merged
        link[rows, j], link[rows, :, j] = -torch.inf, -torch.inf
        sizes[rows, i] += sizes[rows, j]
        sizes[rows, j] = 0
    return sizes
