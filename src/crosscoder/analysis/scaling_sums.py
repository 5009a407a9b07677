"""The sums that latent scaling is made of, for any ordered pairs of sources, in one pass; formulas: `latent_scaling`.

    F_j = Σ_t f_j     S_j = Σ_t f_j²     R_j = Σ_t f_j ⟨v_j, x̂^m(t)⟩     E_j = Σ_t f_j ⟨v_j, e^m(t)⟩     v_j = d_j^b

R and E are kept for every (target m, direction b) that a pair needs: (a, b) and (b, b). Only active pairs are touched:
two products of the width of a source for each. The state is (sums x latents x draws) in fp64, whatever the number of
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import Batch
from crosscoder.analysis.bootstrap import Bootstrap, LatentSums
from crosscoder.analysis.classes import source_pair
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.training.validation import Reconstruction

Pair = tuple[str, str]
"""Keys of two sources: of an ordered pair (a, b), or of a target and of the directions that it is compared with."""


@dataclass(frozen=True)
class Side:
    """What is known of a pair's target m, along the directions v of b; (latents, draws) where sums, (latents) else."""

    reconstruction: Float[Tensor, "latents draws"]
    """R."""
    error: Float[Tensor, "latents draws"]
    """E."""
    own: Float[Tensor, "latents"]
    """⟨v, d^m⟩."""
    mean: Float[Tensor, "latents"]
    """⟨v, μ_m⟩, of the mean in raw space."""
    bias: Float[Tensor, "latents"]
    """⟨v, b_dec^m⟩, of the bias in normalised space."""
    scale: float
    """c_m."""

    def of(self, latents: slice, draws: slice) -> Side:
        """The part for some latents and draws."""
        own, mean, bias = (part[latents] for part in (self.own, self.mean, self.bias))
        return Side(self.reconstruction[latents, draws], self.error[latents, draws], own, mean, bias, self.scale)


@dataclass(frozen=True)
class PairSums:
    """All sums of an ordered pair; draw 0 is the rows as they are, the others are those of the bootstrap."""

    values: Float[Tensor, "latents draws"]
    """F."""
    squares: Float[Tensor, "latents draws"]
    """S."""
    norm: Float[Tensor, "latents"]
    """‖v‖²."""
    at_a: Side
    at_b: Side

    @property
    def sides(self) -> dict[str, Side]:
        """Both targets."""
        return {"a": self.at_a, "b": self.at_b}

    def of(self, latents: slice, draws: slice) -> PairSums:
        """The part for some latents and draws."""
        sides = (side.of(latents, draws) for side in (self.at_a, self.at_b))
        return PairSums(self.values[latents, draws], self.squares[latents, draws], self.norm[latents], *sides)


class ScalingSums:
    """Running sums for the ordered pairs asked for; an observer of a pass that wants reconstructions.

    `pairs` name written sources by key, or by the alias of a model with one. The crosscoder must stay as it is.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        pairs: Sequence[Pair],
        *,
        bootstrap: Bootstrap | None = Bootstrap(),  # noqa: B008 (frozen)
    ) -> None:
        self.crosscoder, self.bootstrap = crosscoder, bootstrap
        resolved = [source_pair(crosscoder, a=a, b=b) for a, b in pairs]
        self.pairs: tuple[Pair, ...] = tuple((a.key, b.key) for a, b in resolved)
        meant = [pair for pair in self.pairs if self.reason(pair) is None]
        self._products: list[Pair] = list(dict.fromkeys(chain.from_iterable(((a, b), (b, b)) for a, b in meant)))
        self._directions = {b: crosscoder.decoder_rows(b).detach().contiguous() for _, b in self._products}
        size = 2 + 2 * len(self._products)
        self._sums = LatentSums(size, crosscoder.num_latents, bootstrap=bootstrap, device=crosscoder.mean.device)

    @property
    def num_active(self) -> Int[Tensor, "latents"]:
        """On how many rows each latent is active."""
        return self._sums.num_active

    @property
    def num_documents(self) -> Int[Tensor, "latents"]:
        """In how many documents each latent is active; 0 without bootstrap."""
        return self._sums.num_documents

    @property
    def num_bytes(self) -> int:
        """The memory that the sums take, which no number of rows changes."""
        return self._sums.num_bytes

    @torch.no_grad()
    def update(self, batch: Batch, found: Reconstruction) -> None:
        """Add the rows of one batch."""
        values = found.code.values.double()
        self._sums.add(batch, found.code, [values, values.square(), *self._terms(found, values)])

    def key(self, *, a: str, b: str) -> Pair:
        """The pair that `a` and `b` name; raises SourceMismatch where it was not asked for."""
        source_a, source_b = source_pair(self.crosscoder, a=a, b=b)
        if (source_a.key, source_b.key) not in self.pairs:
            raise SourceMismatch(
                f"these sums are not of the pair ({source_a.key}, {source_b.key}).",
                details=[f"summed  ({own_a}, {own_b})" for own_a, own_b in self.pairs],
                hint="Name the pair, in this order, when the sums are made.",
            )
        return source_a.key, source_b.key

    def reason(self, pair: Pair) -> str | None:
        """Why scaling between these two sources has no meaning, if so."""
        a, b = (self.crosscoder.writes[key] for key in pair)
        if a.width != b.width:
            return f"{a.key} is {a.width} wide and {b.key} {b.width}: a direction of the one is none of the other."
        derived = [source.key for source in (a, b) if source.difference is not None]
        if derived:
            return f"{derived[0]} is a difference of two sources: no model has it, so that it cannot have a concept."
        return None

    def pair(self, pair: Pair) -> PairSums:
        """The sums of one pair so far."""
        a, b = pair
        totals = self._sums.totals
        norm = _dot(self._directions[b], self._directions[b])
        return PairSums(totals[0], totals[1], norm, at_a=self._side(a, b), at_b=self._side(b, b))

    def _terms(self, found: Reconstruction, values: Tensor) -> list[Tensor]:
        """`f ⟨v, x̂^m⟩` and `f ⟨v, e^m⟩` of every active pair, product by product."""
        multiply = self.crosscoder.backend.operations.pair_products
        columns = self.crosscoder.writes.slices
        return [
            values * multiply(found.code.pattern, target[:, columns[m]], self._directions[b])
            for m, b in self._products
            for target in (found.reconstruction, found.error)
        ]

    def _side(self, m: str, b: str) -> Side:
        cc, v, place = self.crosscoder, self._directions[b], 2 + 2 * self._products.index((m, b))
        columns = cc.writes.slices[m]
        mean, scale = cc.mean_columns(cc.writes)[columns], cc.scale_columns(cc.writes)[columns]
        bias = cc.bias.detach()[columns]
        bias = (bias - mean) * scale if cc.folded_normaliser else bias
        return Side(
            self._sums.totals[place],
            self._sums.totals[place + 1],
            own=_dot(v, cc.decoder_rows(m).detach()),
            mean=_dot(v, mean),
            bias=_dot(v, bias),
            scale=float(scale[0]),
        )


def _dot(v: Float[Tensor, "latents width"], other: Float[Tensor, "*latents width"]) -> Float[Tensor, "latents"]:
    return (v.double() * other.double()).sum(1)
