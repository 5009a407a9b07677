"""What directions of the difference say by themselves: the simplest baselines of a diff, without any dictionary.

With δ = x_b − x_a over rows of the analysis set (raw space):

    first tokens   m_p = mean of δ at position p of contexts of unrelated text, p = 1 … 5, read through the unembedding.
                   A narrow fine-tune can be read from it (Minder et al. 2025, arXiv 2510.13900). Here only the logit
                   lens is used, no patching and no steering; unrelated text is rows of the role `text`.
    components     eigenvectors of the uncentred E[δ δᵀ], so that a constant shift of all rows shows as the first; the
                   share of E‖δ‖² of each, its tokens, and the tokens of the rows on which it is largest.

A direction is read as the logit lens of `logit_lens` reads decoder rows, at the unembedding of b's model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import ROLES, ActivationSource, Batch
from crosscoder.analysis.logit_lens import promoted
from crosscoder.analysis.tokens import token_pieces
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.null_pair import fit_difference, pair_of
from crosscoder.errors import TextError, UnsupportedSite

log = logging.getLogger(__name__)
POSITIONS = (1, 2, 3, 4, 5)
NUM_TOKENS = 10


@dataclass(frozen=True)
class Reading:
    """The tokens that a direction promotes, and those that it suppresses, strongest first."""

    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


@dataclass(frozen=True)
class FirstTokens:
    """The mean difference at each of the first positions of contexts: its length, and what it promotes.

    `relative_lengths` are `‖m_p‖ / E‖x_a‖` there. `role` says which rows they are of; None for all.
    """

    a: str
    b: str
    role: str | None
    positions: tuple[int, ...]
    num_rows: tuple[int, ...]
    relative_lengths: tuple[float, ...]
    readings: tuple[Reading, ...] | None


@dataclass(frozen=True)
class PrincipalComponents:
    """The leading components of the difference: shares of `E‖δ‖²`, tokens they promote, and rows they are largest on.

    `share_of_mean` is `‖E δ‖² / E‖δ‖²`. `largest_positive` and `largest_negative` hold the tokens of extreme rows.
    """

    a: str
    b: str
    num_rows: int
    share_of_mean: float
    shares: tuple[float, ...]
    readings: tuple[Reading, ...] | None
    largest_positive: tuple[tuple[str, ...], ...]
    largest_negative: tuple[tuple[str, ...], ...]


@torch.no_grad()
def first_tokens(
    activations: ActivationSource,
    *,
    a: str,
    b: str,
    model: StudiedModel | None,
    positions: Sequence[int] = POSITIONS,
) -> FirstTokens:
    """The mean difference at the first positions, in one pass; `model` is that of `b`, None for no reading."""
    pair = _Pair.of(activations, a=a, b=b)
    sums = _PositionSums(tuple(positions), pair.width)
    for batch in activations.contexts():
        sums.add(batch, pair.difference(batch.x), lengths=pair.x_a(batch.x).norm(dim=1))
    return sums.result(pair, model)


@torch.no_grad()
def principal_components(
    activations: ActivationSource,
    text: AnalysisSet,
    tokenizer: Tokenizer,
    *,
    a: str,
    b: str,
    model: StudiedModel | None,
    num_components: int = 5,
) -> PrincipalComponents:
    """The leading components, in two passes: one for the moments, one for the rows on which each is largest."""
    pair = _Pair.of(activations, a=a, b=b)
    found = fit_difference(pair.difference(batch.x) for batch in activations.contexts())
    moment = found.covariance + torch.outer(found.mean, found.mean)
    total = float(moment.trace())
    values, vectors = torch.linalg.eigh(moment)
    leading = _oriented(vectors.flip(1)[:, :num_components], found.mean)
    extremes = _Extremes(leading.shape[1])
    for batch in activations.contexts():
        extremes.add(batch, pair.difference(batch.x).double().cpu() @ leading)
    positive, negative = (extremes.pieces(side, text, tokenizer) for side in (0, 1))
    return PrincipalComponents(
        a=pair.a,
        b=pair.b,
        num_rows=found.num_rows,
        share_of_mean=float(found.mean.square().sum()) / max(total, 1e-300),
        shares=tuple((values.flip(0)[:num_components].clamp(min=0) / max(total, 1e-300)).tolist()),
        readings=readings(model, leading.T.float()),
        largest_positive=positive,
        largest_negative=negative,
    )


def readings(model: StudiedModel | None, directions: Float[Tensor, "some width"]) -> tuple[Reading, ...] | None:
    """What each direction promotes and suppresses; None without a model, or where no head of it reads directions."""
    if model is None or not len(directions):
        return None
    try:
        logits = promoted(model, directions.to(model.device)).cpu()
    except UnsupportedSite as error:
        log.warning("directions of the difference are not read: %s", error.message)
        return None
    top = [side.topk(NUM_TOKENS, dim=1).indices.tolist() for side in (logits, -logits)]
    text = token_pieces(model.tokenizer, (token for side in top for row in side for token in row))
    return tuple(
        Reading(tuple(text[token] for token in up), tuple(text[token] for token in down))
        for up, down in zip(*top, strict=True)
    )


@dataclass(frozen=True)
class _Pair:
    """The two sources among those of the activations."""

    a: str
    b: str
    columns_a: slice
    columns_b: slice

    @classmethod
    def of(cls, activations: ActivationSource, *, a: str, b: str) -> _Pair:
        sources = activations.sources
        key_a, key_b = pair_of(sources, a=a, b=b)
        return cls(key_a, key_b, sources.slices[key_a], sources.slices[key_b])

    @property
    def width(self) -> int:
        return self.columns_a.stop - self.columns_a.start

    def x_a(self, x: Tensor) -> Tensor:
        return x[:, self.columns_a]

    def difference(self, x: Tensor) -> Tensor:
        return x[:, self.columns_b] - x[:, self.columns_a]


class _PositionSums:
    """Sums of the difference at some positions, by whether the row is of the role `text`."""

    def __init__(self, positions: tuple[int, ...], width: int) -> None:
        self.positions = positions
        self.counts = torch.zeros(2, len(positions), dtype=torch.int64)
        self.lengths = torch.zeros(2, len(positions), dtype=torch.float64)
        self.sums = torch.zeros(2, len(positions), width, dtype=torch.float64)

    def add(self, batch: Batch, difference: Tensor, *, lengths: Tensor) -> None:
        """Add the rows of one batch that lie at these positions."""
        if batch.rows is None:
            raise TextError(
                "the first tokens of contexts need to know where each row lies; these activations do not say.",
                hint="Read them from a stream over the analysis set, which gives Batch.rows.",
            )
        is_text = (batch.rows.role == ROLES.index("text")).cpu()
        position = batch.rows.position.cpu()
        for number, wanted in enumerate(self.positions):
            for kind in (0, 1):
                chosen = (position == wanted) & (is_text == bool(kind))
                self.counts[kind, number] += int(chosen.sum())
                self.sums[kind, number] += difference.cpu()[chosen].sum(0, dtype=torch.float64)
                self.lengths[kind, number] += lengths.cpu()[chosen].sum(dtype=torch.float64)

    def result(self, pair: _Pair, model: StudiedModel | None) -> FirstTokens:
        """The means, of text where there is some at every position, else of all rows."""
        only_text = bool((self.counts[1] > 0).all())
        counts, sums, lengths = (
            part[1] if only_text else part.sum(0) for part in (self.counts, self.sums, self.lengths)
        )
        seen = counts > 0
        means = sums[seen] / counts[seen, None]
        return FirstTokens(
            a=pair.a,
            b=pair.b,
            role="text" if only_text else None,
            positions=tuple(p for p, there in zip(self.positions, seen.tolist(), strict=True) if there),
            num_rows=tuple(counts[seen].tolist()),
            relative_lengths=tuple((means.norm(dim=1) / (lengths[seen] / counts[seen])).tolist()),
            readings=readings(model, means.float()),
        )


@dataclass
class _Extremes:
    """The rows with the largest and the smallest projection on each component."""

    num_components: int
    num_kept: int = NUM_TOKENS
    values: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch, projections: Float[Tensor, "rows components"]) -> None:
        """Keep the extreme rows of one batch."""
        assert batch.rows is not None, "as checked for the first tokens"
        place = torch.stack([batch.rows.context.cpu().long(), batch.rows.position.cpu().long()], 1)
        kept = min(self.num_kept, len(projections))
        found = [side.topk(kept, dim=0) for side in (projections, -projections)]
        self.values.append(torch.stack([top.values for top in found]))
        self.places.append(torch.stack([place[top.indices] for top in found]))

    def pieces(self, side: int, text: AnalysisSet, tokenizer: Tokenizer) -> tuple[tuple[str, ...], ...]:
        """The tokens of the most extreme rows of each component, each token once; side 0 is positive."""
        values = torch.cat([part[side] for part in self.values])
        places = torch.cat([part[side] for part in self.places])
        order = values.topk(min(self.num_kept, len(values)), dim=0).indices
        return tuple(
            _tokens(places[order[:, number], number], text, tokenizer) for number in range(self.num_components)
        )


def _tokens(places: Int[Tensor, "rows 2"], text: AnalysisSet, tokenizer: Tokenizer) -> tuple[str, ...]:
    tokens = text.token_ids[text.pointers[places[:, 0]] + places[:, 1]].tolist()
    pieces = token_pieces(tokenizer, tokens)
    return tuple(dict.fromkeys(pieces[token] for token in tokens))


def _oriented(vectors: Float[Tensor, "width some"], mean: Float[Tensor, "width"]) -> Float[Tensor, "width some"]:
    """Each with the sign that the mean difference has along it."""
    return vectors * torch.where(mean @ vectors < 0, -1.0, 1.0)
