"""Where some latents are active: every row of the contexts in which each is most active, with the value there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError
from crosscoder.interventions.reading import ReadBlock, read_block, token_blocks
from crosscoder.progress import Progress, silent


@dataclass(frozen=True)
class Firings:
    """Active rows, sorted by latent, context and position; `place` counts the latents that were asked for."""

    place: Int[Tensor, "active"]
    context: Int[Tensor, "active"]
    position: Int[Tensor, "active"]
    value: Float[Tensor, "active"]

    def __len__(self) -> int:
        return len(self.place)

    def take(self, index: Int[Tensor, "some"]) -> Firings:
        """Some of them."""
        return Firings(self.place[index], self.context[index], self.position[index], self.value[index])

    def by_context(self) -> Iterator[Firings]:
        """One after the other the rows of one latent in one context."""
        pair = torch.stack([self.place, self.context])
        sizes = pair.unique_consecutive(dim=1, return_counts=True)[1]
        return (self.take(index) for index in torch.arange(len(self)).split(sizes.tolist()))

    def of_places(self, first: int, count: int) -> Firings:
        """Those of `count` latents from `first` on, which is counted as 0."""
        inside = ((self.place >= first) & (self.place < first + count)).nonzero().squeeze(1)
        own = self.take(inside)
        return Firings(own.place - first, own.context, own.position, own.value)

    @classmethod
    def joined(cls, parts: Sequence[Firings]) -> Firings:
        """Several as one, sorted."""
        place, context, position = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("place", "context", "position")
        )
        order = torch.from_numpy(np.lexsort((position.numpy(), context.numpy(), place.numpy())))
        return cls(place, context, position, torch.cat([part.value for part in parts])).take(order)


def strongest_firings(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    latents: Int[Tensor, "latents"],
    num_contexts: int,
    block_tokens: int,
    progress: Progress = silent,
) -> Firings:
    """The rows of every latent in the `num_contexts` contexts of its largest values; reads all of the text."""
    read = _read(crosscoder, models, text, range(text.num_contexts), block_tokens=block_tokens, progress=progress)
    found = Firings.joined([_picked(part, latents) for part in read])
    pair = found.place * text.num_contexts + found.context
    unique, of_pair = pair.unique(return_inverse=True)
    largest = found.value.new_zeros(len(unique)).scatter_reduce_(0, of_pair, found.value, "amax")
    place = unique // text.num_contexts
    order = torch.from_numpy(np.lexsort((-largest.numpy(), place.numpy())))
    first = torch.searchsorted(place[order], place[order])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first
    return found.take((rank[of_pair] < num_contexts).nonzero().squeeze(1))


def firings_in(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    contexts: Mapping[int, Sequence[int]],
    block_tokens: int,
    progress: Progress = silent,
) -> Firings:
    """The rows of every latent in the contexts that are named for it; reads those contexts alone."""
    wanted = sorted({context for named in contexts.values() for context in named})
    outside = [context for context in wanted if not 0 <= context < text.num_contexts]
    if outside:
        raise EditError(
            f"expected contexts from 0 to {text.num_contexts - 1:,} of the analysis set; got {outside[0]}.",
            hint="Exemplars are of the analysis set that they were found in: evaluate again.",
        )
    latents = torch.tensor(list(contexts), dtype=torch.int64)
    read = _read(crosscoder, models, text, wanted, block_tokens=block_tokens, progress=progress)
    found = Firings.joined([_picked(part, latents) for part in read] or [_NONE])
    named = [place * text.num_contexts + c for place, own in enumerate(contexts.values()) for c in own]
    inside = torch.isin(found.place * text.num_contexts + found.context, torch.tensor(named, dtype=torch.int64))
    return found.take(inside.nonzero().squeeze(1))


_NOWHERE = torch.empty(0, dtype=torch.int64)
_NONE = Firings(_NOWHERE, _NOWHERE, _NOWHERE, torch.empty(0))


def _read(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    contexts: Sequence[int],
    *,
    block_tokens: int,
    progress: Progress,
) -> Iterator[ReadBlock]:
    blocks = token_blocks([(number, text.context(number)) for number in contexts], most_tokens=block_tokens)
    for done, block in enumerate(blocks, start=1):
        yield read_block(crosscoder, models, block)
        progress("reading what latents are active on", done, len(blocks))


def _picked(read: ReadBlock, latents: Int[Tensor, "latents"]) -> Firings:
    """The pairs of a block's code that are of these latents."""
    place = torch.full((read.code.num_latents,), -1)
    place[latents] = torch.arange(len(latents))
    own = place[read.code.latents.cpu()]
    active = (own >= 0).nonzero().squeeze(1)
    row, position = read.block.kept.nonzero(as_tuple=True)
    at = read.code.row_ids.cpu()[active]
    return Firings(own[active], read.block.numbers[row[at]], position[at], read.code.values.cpu()[active])
