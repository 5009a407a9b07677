"""Warm start: initial weights of a crosscoder from sparse autoencoders of its sources, without the duplicates.

SAEs are converted exactly into this crosscoder's normalised space (`dictionaries`), whatever their own normaliser.
Latents of different sources that are similar enough become one, with the members' decoder rows, each at its source:

    W_enc[R_s] = W_enc_s / m        b_enc = mean of the m biases        W_dec[s] = W_dec_s

over the m members whose source is read, so that the pre-activation is the mean of theirs. *Similarity* is the cosine
of decoder rows, with the member at the nearest earlier source, since directions drift along the layers. Where rows are
given it is the correlation of the two latents' values on them, which needs no equal widths; without rows, latents of
sources of different width are never merged.

A cluster goes to a group that reads and writes its first source and writes all its others: of several, to the one that
writes the fewest sources (an unmatched latent of one model goes to that model's own group), then in the wiring's order.
Most often used first where rows are given; else first latents first, one of each source in turn.

At written sources without a match the decoder is the latent's own direction (equal widths) or the drawn one, at
`unmatched_norm` times its own norm: small enough not to disturb, and with a direction. Encoders are zero at read
sources without a match. Thresholds and affine skips stay as they are.

Source: Gemma Scope 2 (multi-layer dictionaries from single-layer SAEs, "de-duplicated by decoder·encoder similarity").
Deviation: decoder with decoder, since an SAE's encoder is at no fixed angle to its own decoder, so that no cut on their
product means the same in two dictionaries.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, WiringError
from crosscoder.sources import SourceSet
from crosscoder.training.dictionaries import Cluster, Clustering, Dictionary, converted
from crosscoder.wiring import LatentGroup, Wiring

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """What came from where. `origin[i, s]` is the latent of dictionary s that latent i holds, or −1.

    Of the dictionary of each of `sources`, `taken` latents are the first member of a latent here, `merged` joined one
    of an earlier source, and `left_out` found no room. `as_drawn` latents of the crosscoder keep their initial weights.
    """

    sources: tuple[str, ...]
    origin: Int[Tensor, "latents sources"]
    num_offered: tuple[int, ...]

    @property
    def taken(self) -> tuple[int, ...]:
        """Latents of each source that are the first member of a latent."""
        earlier = torch.nn.functional.pad(self.origin >= 0, (1, 0))[:, :-1].cumsum(1)
        return tuple(((self.origin >= 0) & (earlier == 0)).sum(0).tolist())

    @property
    def merged(self) -> tuple[int, ...]:
        """Latents of each source that joined one of an earlier source."""
        held = (self.origin >= 0).sum(0).tolist()
        return tuple(all_held - first for all_held, first in zip(held, self.taken, strict=True))

    @property
    def left_out(self) -> tuple[int, ...]:
        """Latents of each source for which there was no room."""
        held = (self.origin >= 0).sum(0).tolist()
        return tuple(offered - number for offered, number in zip(self.num_offered, held, strict=True))

    @property
    def as_drawn(self) -> int:
        """Latents of the crosscoder that nothing filled."""
        return int((self.origin < 0).all(1).sum())

    def table(self) -> pa.Table:
        """One row per source."""
        counts = {"offered": self.num_offered, "taken": self.taken, "merged": self.merged, "left_out": self.left_out}
        columns = {name: pa.array(values, pa.int32()) for name, values in counts.items()}
        return pa.table({"source": pa.array(self.sources), **columns})


@torch.no_grad()
def warm_start(
    crosscoder: Crosscoder,
    dictionaries: Mapping[str, Crosscoder],
    *,
    similarity: float = 0.7,
    rows: Float[Tensor, "rows width"] | None = None,
    unmatched_norm: float = 0.1,
) -> WarmStart:
    """Fill `crosscoder` with latents of SAEs, each given under its source; call it once the normaliser is set.

    `rows` are raw activations packed over all sources of the crosscoder. Raises SourceMismatch for a dictionary that
    does not fit its source, WiringError where no group reads and writes that source.
    """
    _check(crosscoder, dictionaries, similarity)
    keys = [key for key in crosscoder.sources.keys if key in dictionaries]
    found = {key: converted(crosscoder, dictionaries[key], key, rows=rows) for key in keys}
    clusters = Clustering(found, similarity, partial(_has_home, crosscoder.wiring)).clusters()
    densities = {key: dictionary.density() for key, dictionary in found.items()}
    origin = _placed(sorted(clusters, key=partial(_rank, densities)), crosscoder.wiring, keys)
    for number, (first, last) in enumerate(crosscoder.wiring.latent_ranges):
        _fill(crosscoder, number, _Part(found, origin[first:last]), unmatched_norm=unmatched_norm)
    bias: Tensor = crosscoder.bias
    for key, dictionary in found.items():
        bias[crosscoder.writes.slices[key]] = dictionary.source_bias
    crosscoder.settle()
    result = WarmStart(tuple(keys), origin, tuple(dictionary.num_latents for dictionary in found.values()))
    if any(result.left_out):
        log.warning("warm start: no room for %s latents of the dictionaries.", f"{sum(result.left_out):,}")
    return result


@dataclass(frozen=True)
class _Part:
    """What the latents of one group come from."""

    dictionaries: Mapping[str, Dictionary]
    origin: Tensor

    @property
    def filled(self) -> Tensor:
        """The latents of the group that anything fills."""
        return (self.origin >= 0).any(1).nonzero().squeeze(1)

    def members(self, key: str) -> tuple[Tensor, Tensor]:
        """The latents of the group with a member at a source, and those members."""
        column = self.origin[:, list(self.dictionaries).index(key)]
        held = (column >= 0).nonzero().squeeze(1)
        return held, column[held]

    def first_members(self, key: str) -> tuple[Tensor, Tensor]:
        """Those whose first member is at a source, and those members."""
        place = list(self.dictionaries).index(key)
        first = (self.origin[:, place] >= 0) & (self.origin[:, :place] < 0).all(1)
        held = first.nonzero().squeeze(1)
        return held, self.origin[held, place]


def _fill(crosscoder: Crosscoder, number: int, part: _Part, *, unmatched_norm: float) -> None:
    group, weights = crosscoder.wiring.groups[number], crosscoder.weights[number]
    encoder, bias = torch.zeros_like(weights.encoder), torch.zeros_like(weights.encoder_bias)
    count = torch.zeros_like(bias)
    reads = crosscoder.sources.subset(group.reads)
    for key in (key for key in part.dictionaries if key in reads):
        held, members = part.members(key)
        encoder[held, reads.slices[key]] = part.dictionaries[key].encoder[members]
        bias[held] += part.dictionaries[key].bias[members]
        count[held] += 1
    filled = part.filled
    weights.encoder[filled] = encoder[filled] / count[filled, None]
    weights.encoder_bias[filled] = bias[filled] / count[filled]
    _fill_decoder(weights.decoder, group, part, writes=crosscoder.sources.subset(group.writes), small=unmatched_norm)


def _fill_decoder(decoder: Tensor, group: LatentGroup, part: _Part, *, writes: SourceSet, small: float) -> None:
    """Members' rows where there is one, elsewhere the first member's direction; with tied norms, all of its norm."""
    slices = dict.fromkeys(writes.keys, slice(None)) if group.tied == "decoder" else writes.slices
    own_keys = [key for key in part.dictionaries if key in writes]
    for key in own_keys:
        held, members = part.first_members(key)
        own = part.dictionaries[key].decoder[members]
        for columns in slices.values():
            drawn = decoder[held, columns]
            row = own if own.shape == drawn.shape else _at_norm(drawn, own)
            decoder[held, columns] = row if group.tied else small * row
    for key in own_keys if group.tied != "decoder" else []:
        held, members = part.members(key)
        row = part.dictionaries[key].decoder[members]
        decoder[held, slices[key]] = _at_norm(row, decoder[held, slices[key]]) if group.tied else row


def _at_norm(rows: Tensor, like: Tensor) -> Tensor:
    """`rows`, each at the norm of the same row of `like`."""
    return normalize(rows, dim=1) * like.norm(dim=1, keepdim=True)


def _placed(clusters: Sequence[Cluster], wiring: Wiring, keys: Sequence[str]) -> Int[Tensor, "latents sources"]:
    """The members that each latent of the crosscoder gets, −1 where it gets none; clusters in order of preference."""
    origin = torch.full((wiring.num_latents, len(keys)), -1)
    free = [iter(range(*latents)) for latents in wiring.latent_ranges]
    for cluster in clusters:
        slot = next((slot for home in _homes(wiring, tuple(cluster)) for slot in free[home]), None)
        if slot is not None:
            for key, latent in cluster.items():
                origin[slot, keys.index(key)] = latent
    return origin


def _rank(densities: Mapping[str, list[float]], cluster: Cluster) -> tuple[float, int]:
    """Most often used first, then by the number of the first member; sorting keeps sources in turn."""
    return -max(densities[key][latent] for key, latent in cluster.items()), next(iter(cluster.values()))


@cache
def _homes(wiring: Wiring, members: tuple[str, ...]) -> list[int]:
    """Groups that can hold a cluster of these sources, the one that writes least first."""
    able = [
        number for number, group in enumerate(wiring) if members[0] in group.reads and set(members) <= set(group.writes)
    ]
    return sorted(able, key=lambda number: len(wiring.groups[number].writes))


def _has_home(wiring: Wiring, members: Sequence[str]) -> bool:
    return bool(_homes(wiring, tuple(members)))


def _check(crosscoder: Crosscoder, dictionaries: Mapping[str, Crosscoder], similarity: float) -> None:
    if crosscoder.folded_normaliser:
        raise ConfigError("a folded crosscoder is for inference.", hint="Start one that is to be trained.")
    if not 0 < similarity <= 1:
        raise ConfigError(f"expected a similarity above 0, at most 1; got {similarity}.", hint="0.7 is the default.")
    if not dictionaries:
        raise ConfigError("expected a dictionary to start from; got none.", hint="Give {source key: its SAE}.")
    for key in dictionaries:
        if not _has_home(crosscoder.wiring, [crosscoder.sources[key].key]):
            raise WiringError(
                f"no group both reads and writes {key}, so its dictionary has no place.",
                details=[
                    f"{group.name}  {', '.join(group.reads)} -> {', '.join(group.writes)}"
                    for group in crosscoder.wiring
                ],
                hint="Start only from dictionaries of sources that some group reads and writes.",
            )
