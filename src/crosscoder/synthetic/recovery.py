"""Were exclusive concepts found, and were latents called exclusive that should not be? Two sources `a` and `b`.

A latent is *called* exclusive by its decoder norms in normalised space: with `share = n_b / (n_a + n_b)`, a-only below
one cut and b-only above another. What it stands for is asked at its own source alone: the concept that lives there with
the largest cosine, if that exceeds the cosine cut. (Side by side, a latent with one half of a shared concept would have
cosine 0.71 and match nothing, and shrinkage could not be told from noise.)

    right        its concept lives at that source alone
    shrunk       its concept lives at both: the norm at the other source shrank ("complete shrinkage")
    nothing      no concept matches
    decoupled    a shared concept that has a latent called a-only and another called b-only  ("latent decoupling")

    recall       exclusive concepts with a live latent that is called exclusive to their source and matches
    precision    right / called                     false-exclusive rate    (called − right) / live latents

Sources: Jiralerspong & Bricken 2026 (cosine 0.83, share 0.2 and 0.8, false positives of two sorts); Minder et al. 2025
(shrinkage and decoupling, relative norm 0.1 and 0.9). Deviation: dead latents are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.synthetic.matching import cosines
from crosscoder.synthetic.truth import Truth

VERDICTS = ("not called", "right", "shrunk", "nothing")
"""What becomes of a latent; `ExclusiveRecovery.verdicts` is an index into this."""


@dataclass(frozen=True)
class Cuts:
    """Where a latent is called exclusive, and how near it must be to a concept."""

    a_only: float = 0.2
    b_only: float = 0.8
    cosine: float = 0.83
    statistic: Literal["share", "relative_norm"] = "share"


CUTS: Mapping[str, Cuts] = MappingProxyType(
    {
        "dfc": Cuts(),
        "anthropic": Cuts(0.05, 0.95),
        "minder": Cuts(0.1, 0.9, statistic="relative_norm"),
    }
)
"""Published cuts on the norms by name; the cosine is that of dedicated-feature crosscoders in all."""


@dataclass(frozen=True)
class ExclusiveRecovery:
    """What became of every latent and of every exclusive concept.

    `called` is 0 for a latent that is not called exclusive (or dead), 1 for a-only, 2 for b-only; `concept` is the best
    match at the source that the latent is called exclusive to, of cosine `cosine` (for others at their stronger one).
    `recovered` is over concepts and False where they are not exclusive to `a` or `b`; `matched` disregards the norms:
    a live latent matches the concept at its source, whatever it is called.
    """

    a: str
    b: str
    cuts: Cuts
    live: Bool[Tensor, "latents"]
    called: Int[Tensor, "latents"]
    verdicts: Int[Tensor, "latents"]
    concept: Int[Tensor, "latents"]
    cosine: Float[Tensor, "latents"]
    only_a: Bool[Tensor, "concepts"]
    only_b: Bool[Tensor, "concepts"]
    recovered: Bool[Tensor, "concepts"]
    matched: Bool[Tensor, "concepts"]
    decoupled: Bool[Tensor, "concepts"]

    @property
    def recall(self) -> float:
        """Fraction of the concepts exclusive to `a` or `b` that are recovered; NaN where there are none."""
        return _fraction(self.recovered, self.only_a | self.only_b)

    @property
    def matched_recall(self) -> float:
        """Fraction of them that some live latent matches, whatever its norms say."""
        return _fraction(self.matched, self.only_a | self.only_b)

    @property
    def num_called(self) -> int:
        """Live latents called exclusive."""
        return int((self.called > 0).sum())

    @property
    def precision(self) -> float:
        """Fraction of the called latents that are right; NaN where none is called."""
        return _fraction(self.verdicts == VERDICTS.index("right"), self.called > 0)

    @property
    def false_exclusive_rate(self) -> float:
        """Fraction of the live latents that are called exclusive and are not right."""
        return _fraction((self.called > 0) & (self.verdicts != VERDICTS.index("right")), self.live)

    @property
    def num_shrunk(self) -> int:
        """Latents called exclusive whose concept lives at both sources."""
        return int((self.verdicts == VERDICTS.index("shrunk")).sum())

    @property
    def num_nothing(self) -> int:
        """Latents called exclusive that match no concept."""
        return int((self.verdicts == VERDICTS.index("nothing")).sum())

    @property
    def num_decoupled(self) -> int:
        """Shared concepts with a latent called a-only and another called b-only."""
        return int(self.decoupled.sum())

    def table(self) -> pa.Table:
        """One row per latent."""
        names = (None, self.a, self.b)
        return pa.table(
            {
                "latent": pa.array(range(len(self.called)), pa.int32()),
                "live": pa.array(self.live.tolist()),
                "called_exclusive_to": pa.array([names[i] for i in self.called.tolist()], pa.string()),
                "verdict": pa.array([VERDICTS[i] for i in self.verdicts.tolist()]),
                "concept": pa.array(self.concept.tolist(), pa.int32()),
                "cosine": pa.array(self.cosine.tolist(), pa.float32()),
            }
        )


@torch.no_grad()
def exclusive_recovery(
    crosscoder: Crosscoder,
    truth: Truth,
    *,
    a: str,
    b: str,
    density: Float[Tensor, "latents"] | None = None,
    cuts: Cuts | None = None,
) -> ExclusiveRecovery:
    """Exclusive concepts and latents between the written sources `a` and `b` (keys, or aliases with one source).

    With the `density` of every latent on some rows, those that never fire are left out as dead.
    """
    key_a, key_b = (crosscoder.writes.resolve(name).key for name in (a, b))
    if key_a == key_b:
        raise SourceMismatch(f"expected two sources to compare; got {key_a} twice.")
    cuts = cuts or Cuts()
    norms = crosscoder.decoder_norms("normalised").cpu()[:, [crosscoder.writes.index(k) for k in (key_a, key_b)]]
    live = torch.ones(len(norms), dtype=torch.bool) if density is None else density.cpu() > 0
    called = _called(norms, cuts) * live
    at = torch.stack([cosines(crosscoder, truth, source=key) for key in (key_a, key_b)])
    side = torch.where(called > 0, called - 1, norms.argmax(1))
    own = at[side, torch.arange(len(side))]
    cosine, concept = own.max(dim=1)
    only_a, only_b = truth.exclusive_to(key_a, against=key_b), truth.exclusive_to(key_b, against=key_a)
    near = (at > cuts.cosine) & live[:, None]
    near_called = torch.stack([near[i] & (called == i + 1)[:, None] for i in (0, 1)])
    found = near_called.any(1)
    return ExclusiveRecovery(
        a=key_a,
        b=key_b,
        cuts=cuts,
        live=live,
        called=called,
        verdicts=_verdicts(called, cosine > cuts.cosine, (only_a | only_b)[concept]),
        concept=concept,
        cosine=cosine,
        only_a=only_a,
        only_b=only_b,
        recovered=(found[0] & only_a) | (found[1] & only_b),
        matched=(near[0].any(0) & only_a) | (near[1].any(0) & only_b),
        decoupled=_decoupled(called, concept, cosine > cuts.cosine, num_concepts=truth.num_concepts),
    )


def exclusivity(norms: Float[Tensor, "latents 2"], statistic: Literal["share", "relative_norm"]) -> Float[Tensor, "_"]:
    """`n_b / (n_a + n_b)`, or `½ ((n_b − n_a) / max + 1)`: 0 is a alone, ½ both alike, 1 b alone; NaN for no norm."""
    n_a, n_b = norms.unbind(1)
    if statistic == "share":
        return n_b / (n_a + n_b)
    return ((n_b - n_a) / norms.amax(1) + 1) / 2


@torch.no_grad()
def firing_density(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ reads"]]) -> Float[Tensor, "latents"]:
    """Fraction of rows (raw packed reads) on which each latent is active, in eval mode; the mode found is restored."""
    was_training, rows, active = crosscoder.training, 0, torch.zeros(crosscoder.num_latents)
    crosscoder.eval()
    try:
        for x in batches:
            code = crosscoder.encode(x)
            active += torch.bincount(code.latents.cpu(), minlength=crosscoder.num_latents)
            rows += code.num_rows
    finally:
        crosscoder.train(was_training)
    return active / max(1, rows)


def _called(norms: Tensor, cuts: Cuts) -> Int[Tensor, "latents"]:
    value = exclusivity(norms, cuts.statistic)
    return (value < cuts.a_only).long() + 2 * (value > cuts.b_only).long()


def _verdicts(called: Tensor, near: Tensor, exclusive: Tensor) -> Int[Tensor, "latents"]:
    verdict = torch.full_like(called, VERDICTS.index("nothing"))
    verdict[near & exclusive] = VERDICTS.index("right")
    verdict[near & ~exclusive] = VERDICTS.index("shrunk")
    verdict[called == 0] = VERDICTS.index("not called")
    return verdict


def _decoupled(called: Tensor, concept: Tensor, near: Tensor, *, num_concepts: int) -> Bool[Tensor, "concepts"]:
    """A concept can only be the best match on both sides if it lives at both."""
    sides = torch.zeros(2, num_concepts, dtype=torch.bool)
    for side in (0, 1):
        sides[side, concept[near & (called == side + 1)]] = True
    return sides.all(0)


def _fraction(part: Tensor, whole: Tensor) -> float:
    number = int(whole.sum())
    return float((part & whole).sum()) / number if number else float("nan")
