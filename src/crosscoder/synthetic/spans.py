"""Layer worlds: where does a latent say that a concept begins and ends, and does it follow the concept's drift?

Every concept is given the latent with the largest cosine over all sources side by side. The latent's span reaches from
the first to the last source where its decoder norm (normalised space) is at least `norm_cut` of its largest. With the
true span [b, e] and the latent's [b̂, ê], counted in sources,

    overlap = |[b, e] ∩ [b̂, ê]| / |[b, e] ∪ [b̂, ê]|        begin error = b̂ − b        end error = ê − e

`following` is the mean over the true span of the cosine at each source: 1 when a latent turns as its concept does.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.synthetic.matching import cosines
from crosscoder.synthetic.truth import Truth


@dataclass(frozen=True)
class SpanRecovery:
    """The best latent of every concept, its cosine, its span beside the true one, and how it follows the drift."""

    latents: Int[Tensor, "concepts"]
    cosine: Float[Tensor, "concepts"]
    recovered: Bool[Tensor, "concepts"]
    true_span: Int[Tensor, "concepts 2"]
    span: Int[Tensor, "concepts 2"]
    overlap: Float[Tensor, "concepts"]
    following: Float[Tensor, "concepts"]

    @property
    def recall(self) -> float:
        """Fraction of the concepts whose best latent exceeds the cosine cut."""
        return float(self.recovered.double().mean())

    @property
    def exact_fraction(self) -> float:
        """Fraction of the recovered concepts whose span is right at both ends."""
        return self._over_recovered((self.span == self.true_span).all(1))

    @property
    def mean_overlap(self) -> float:
        """Mean overlap of the recovered concepts' spans."""
        return self._over_recovered(self.overlap)

    @property
    def mean_error(self) -> float:
        """Mean distance in sources between true and found ends of the recovered concepts."""
        return self._over_recovered((self.span - self.true_span).abs().double().mean(1))

    def table(self) -> pa.Table:
        """One row per concept."""
        ends = {"true_begin": self.true_span[:, 0], "true_end": self.true_span[:, 1]}
        ends |= {"begin": self.span[:, 0], "end": self.span[:, 1]}
        return pa.table(
            {
                "concept": pa.array(range(len(self.latents)), pa.int32()),
                "latent": pa.array(self.latents.tolist(), pa.int32()),
                "cosine": pa.array(self.cosine.tolist(), pa.float32()),
                "recovered": pa.array(self.recovered.tolist()),
            }
            | {name: pa.array(values.tolist(), pa.int32()) for name, values in ends.items()}
            | {
                "overlap": pa.array(self.overlap.tolist(), pa.float32()),
                "following": pa.array(self.following.tolist(), pa.float32()),
            }
        )

    def _over_recovered(self, values: Tensor) -> float:
        return float(values[self.recovered].double().mean())


@torch.no_grad()
def span_recovery(crosscoder: Crosscoder, truth: Truth, *, norm_cut: float = 0.3, cosine: float = 0.83) -> SpanRecovery:
    """Spans of a crosscoder that writes all sources of the world; `cosine` is where a concept counts as recovered."""
    if crosscoder.writes != truth.sources:
        raise SourceMismatch(
            "spans need a crosscoder that writes all sources of the world, in their order.",
            details=[f"crosscoder  {key}" for key in crosscoder.writes.keys]
            + [f"world       {key}" for key in truth.sources.keys],
        )
    best = cosines(crosscoder, truth).max(dim=0)
    norms = crosscoder.decoder_norms("normalised").cpu()[best.indices]
    span = _ends(norms >= norm_cut * norms.amax(1, keepdim=True))
    at_each = torch.stack([cosines(crosscoder, truth, source=key) for key in truth.sources.keys])
    own = at_each[:, best.indices, torch.arange(truth.num_concepts)].T
    return SpanRecovery(
        latents=best.indices,
        cosine=best.values,
        recovered=best.values > cosine,
        true_span=truth.span,
        span=span,
        overlap=_overlap(span, truth.span),
        following=(own * truth.presence).sum(1) / truth.presence.sum(1),
    )


def _ends(there: Bool[Tensor, "concepts sources"]) -> Int[Tensor, "concepts 2"]:
    last = there.shape[1] - 1 - there.int().flip(1).argmax(1)
    return torch.stack([there.int().argmax(1), last], dim=1)


def _overlap(span: Int[Tensor, "concepts 2"], true: Int[Tensor, "concepts 2"]) -> Float[Tensor, "concepts"]:
    both = torch.minimum(span[:, 1], true[:, 1]) - torch.maximum(span[:, 0], true[:, 0]) + 1
    sizes = (span[:, 1] - span[:, 0]) + (true[:, 1] - true[:, 0]) + 2
    both = both.clamp(min=0).float()
    return both / (sizes - both)
