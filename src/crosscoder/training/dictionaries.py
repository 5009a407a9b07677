"""Sparse autoencoders of single sources, seen from a crosscoder's normalised space, and which of their latents are one.

An SAE normalises `x̃' = (x − μ') c'`, the crosscoder `x̃ = (x − μ) c`. The same function in the crosscoder's space is

    W_enc ← W_enc c'/c       b_enc ← b_enc + W_enc c' (μ − μ')
    W_dec ← W_dec c/c'       b_dec ← (b_dec/c' + μ' − μ) c

Clusters are greedy: sources in order, a latent of a later source joins the cluster whose member at the nearest earlier
source is most similar to it, above a cut, at most one latent of a source to a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.training.validation import evaluating

BLOCK = 1024
"""Latents of one side that are compared at a time."""

Cluster = dict[str, int]
"""Latents that become one: source to latent of that source's dictionary, the first member first."""


@dataclass(frozen=True)
class Dictionary:
    """The SAE of one source in a crosscoder's normalised space, with its values on some rows when there are any."""

    encoder: Float[Tensor, "latents width"]
    bias: Float[Tensor, "latents"]
    decoder: Float[Tensor, "latents width"]
    source_bias: Float[Tensor, "width"]
    values: Float[Tensor, "rows latents"] | None

    @property
    def num_latents(self) -> int:
        """Its latents."""
        return len(self.bias)

    def density(self) -> list[float]:
        """The fraction of rows on which each latent is active; 0 for all where there are no rows."""
        return [0.0] * self.num_latents if self.values is None else (self.values > 0).double().mean(0).tolist()


@torch.no_grad()
def converted(
    crosscoder: Crosscoder, sae: Crosscoder, source: str, *, rows: Float[Tensor, "rows width"] | None
) -> Dictionary:
    """The SAE of one source of `crosscoder`, in its space; `rows` are packed over all of the crosscoder's sources.

    Raises SourceMismatch unless the SAE has one source of that width, and NotCalibrated as `encode` does.
    """
    _check_fits(crosscoder, sae, source)
    columns, to = crosscoder.sources.slices[source], crosscoder.bias
    mean, scale = crosscoder.mean[columns], crosscoder.scale[crosscoder.sources.index(source)]
    own = sae.mean_columns(sae.reads), sae.scale_columns(sae.reads)[0]
    theirs = (torch.zeros_like(mean), torch.ones_like(scale)) if sae.folded_normaliser else own
    their_mean, their_scale = (part.to(to) for part in theirs)
    encoder, bias, decoder = (
        torch.cat([getattr(group, name) for group in sae.weights]).to(to)
        for name in ("encoder", "encoder_bias", "decoder")
    )
    return Dictionary(
        encoder=encoder * (their_scale / scale),
        bias=bias + encoder @ ((mean - their_mean) * their_scale),
        decoder=decoder * (scale / their_scale),
        source_bias=(sae.bias.to(to) / their_scale + their_mean - mean) * scale,
        values=None if rows is None else _values(sae, crosscoder.sources.unpack(rows)[source]),
    )


@dataclass(frozen=True)
class Clustering:
    """How latents of several dictionaries are put together: `allowed` says which sources a cluster may span."""

    dictionaries: Mapping[str, Dictionary]
    cut: float
    allowed: Callable[[Sequence[str]], bool]

    def clusters(self) -> list[Cluster]:
        """Every latent in exactly one cluster, in order of first members."""
        clusters: list[Cluster] = []
        for source, dictionary in self.dictionaries.items():
            joins = self._joins(clusters, source)
            for latent in range(dictionary.num_latents):
                if latent in joins:
                    clusters[joins[latent]][source] = latent
                else:
                    clusters.append({source: latent})
        return clusters

    def _joins(self, clusters: Sequence[Cluster], source: str) -> dict[int, int]:
        """Which latents of a source join which clusters: the most similar pair first, each side once."""
        joins: dict[int, int] = {}
        taken: set[int] = set()
        for _, cluster, latent in sorted(self._pairs(clusters, source), key=lambda pair: -pair[0]):
            if latent not in joins and cluster not in taken:
                joins[latent] = cluster
                taken.add(cluster)
        return joins

    def _pairs(self, clusters: Sequence[Cluster], source: str) -> Iterator[tuple[float, int, int]]:
        """Similarity, cluster, latent, for all pairs above the cut."""
        by_nearest: dict[str, list[int]] = {}
        for number, cluster in enumerate(clusters):
            if self.allowed([*cluster, source]):
                by_nearest.setdefault(list(cluster)[-1], []).append(number)
        for nearest, numbers in by_nearest.items():
            for start in range(0, len(numbers), BLOCK):
                part = numbers[start : start + BLOCK]
                found = self._similarity(nearest, [clusters[number][nearest] for number in part], source)
                above = found > self.cut
                places = above.nonzero().tolist()
                yield from ((s, part[i], j) for s, (i, j) in zip(found[above].tolist(), places, strict=True))

    def _similarity(self, earlier: str, latents: list[int], later: str) -> Tensor:
        """(those latents of `earlier`, latents of `later`): cosine of decoder rows, or correlation of values."""
        a, b = self.dictionaries[earlier], self.dictionaries[later]
        if a.values is not None and b.values is not None:
            return _standardised(a.values[:, latents]).T @ _standardised(b.values)
        if a.decoder.shape[1] != b.decoder.shape[1]:
            return a.decoder.new_zeros(len(latents), b.num_latents)
        return normalize(a.decoder[latents], dim=1) @ normalize(b.decoder, dim=1).T


def _values(sae: Crosscoder, rows: Tensor) -> Tensor:
    with evaluating(sae):
        return sae.encode(rows.to(sae.bias)).to_dense()


def _standardised(values: Tensor) -> Tensor:
    """Columns of mean 0 and length 1; a latent that never varies stays 0 and is like no other."""
    return normalize(values - values.mean(0), dim=0)


def _check_fits(crosscoder: Crosscoder, sae: Crosscoder, source: str) -> None:
    width = crosscoder.sources[source].width
    if sae.reads.widths != (width,) or sae.writes != sae.reads:
        raise SourceMismatch(
            f"the dictionary of {source} has to read and write that one source, of width {width}.",
            details=sae.sources.describe(),
            hint="Give one sparse autoencoder (a crosscoder of one source) per source.",
        )
