"""Seed stability: which latents come back when the crosscoder is trained again from another seed.

A latent that only one seed has is a fact about that training, not about the models. Every latent of the reference is
matched in each other crosscoder by decoder cosine and, where rows are given, by the correlation of values on them
(`latent_matches`). It *comes back* in a seed where its mutual match has at least the cut. With classes for every
crosscoder, matches also say whether what is exclusive here is exclusive there.

Latents that are dead in the reference have no similarity and count nowhere; a match may be any latent of the other.
Paulo & Belrose 2025 match autoencoders so, at a cosine of 0.7, and find a third of the latents in every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import ActivationSource
from crosscoder.analysis.classes import CLASSES, LatentClasses
from crosscoder.analysis.latent_matches import JointSums, LatentMatches, check_same_writes, decoder_matches
from crosscoder.analysis.passes import check_sources
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError
from crosscoder.groups import Columns
from crosscoder.progress import Progress, silent
from crosscoder.training.validation import evaluating

MATCH = 0.7
By = Literal["decoder", "activation"]


@dataclass(frozen=True)
class SeedStability:
    """Matches of a reference crosscoder in others, one entry per other; `by_activation` is empty without rows.

    `classes` are of the reference and then of each other, or empty. `live` is all latents where no rows and no classes
    tell who is dead.
    """

    by_decoder: tuple[LatentMatches, ...]
    by_activation: tuple[LatentMatches, ...]
    live: Bool[Tensor, "latents"]
    classes: tuple[LatentClasses, ...]
    cosine_cut: float
    correlation_cut: float

    def largest(self, by: By = "decoder") -> Float[Tensor, "latents"]:
        """Each latent's largest similarity in any other seed; NaN for a dead one."""
        found = torch.stack([match.similarity for match in self._matches(by)]).nan_to_num(nan=-torch.inf).amax(0)
        return torch.where(self.live & found.isfinite(), found, torch.nan)

    def num_seeds(self, by: By = "decoder") -> Int[Tensor, "latents"]:
        """In how many other seeds each latent comes back."""
        return torch.stack([self._comes_back(match) for match in self._matches(by)]).sum(0) * self.live

    def shares(self, by: By = "decoder") -> list[float]:
        """For every other seed, the share of live latents that come back."""
        return [_share(self._comes_back(match), self.live) for match in self._matches(by)]

    def shares_of_class(self, name: str, by: By = "decoder") -> list[float]:
        """The same of the reference's latents of one class."""
        inside = self.live & (self.classes[0].class_ids.cpu() == CLASSES.index(name))
        return [_share(self._comes_back(match), inside) for match in self._matches(by)]

    def agreement(self, by: By = "decoder") -> Int[Tensor, "classes classes_and_none"]:
        """Live latents by class here and class of the match there, over all seeds; last column: do not come back."""
        found = torch.zeros(len(CLASSES), len(CLASSES) + 1, dtype=torch.int64)
        if not self.classes:
            return found
        here = self.classes[0].class_ids.cpu()
        for match, other in zip(self._matches(by), self.classes[1:], strict=True):
            there = torch.where(self._comes_back(match), other.class_ids.cpu()[match.best], len(CLASSES))
            found.index_put_((here[self.live], there[self.live]), torch.tensor(1), accumulate=True)
        return found

    def table(self) -> pa.Table:
        """One row per latent of the reference."""
        columns: dict[str, Any] = {"latent": pa.array(range(len(self.live)), pa.int32()), "live": self.live.numpy()}
        names: dict[By, str] = {"decoder": "cosine", "activation": "correlation"}
        for by, name in names.items():
            if self._matches(by):
                columns[f"largest_{name}"] = pa.array(self.largest(by).float().numpy(), from_pandas=True)
                columns[f"num_seeds_by_{by}"] = pa.array(self.num_seeds(by).int().numpy())
        return pa.table(columns)

    def to_json(self) -> dict[str, Any]:
        """Shares that come back, by seed and by class, and how classes agree."""
        ways: list[By] = ["decoder", "activation"]
        return {
            "cuts": {"decoder": self.cosine_cut, "activation": self.correlation_cut},
            "num_seeds": len(self.by_decoder),
            "num_live": int(self.live.sum()),
            **{f"by_{by}": self._summary(by) for by in ways if self._matches(by)},
        }

    def _summary(self, by: By) -> dict[str, Any]:
        largest = self.largest(by)
        known = largest[largest.isfinite()]
        summary: dict[str, Any] = {
            "share_per_seed": self.shares(by),
            "median_largest": float(known.median()) if len(known) else None,
        }
        if self.classes:
            names = [*CLASSES, "does not come back"]
            rows = zip(CLASSES, self.agreement(by).tolist(), strict=True)
            summary["share_per_seed_by_class"] = {name: self.shares_of_class(name, by) for name in CLASSES}
            summary["class_of_match"] = {name: dict(zip(names, row, strict=True)) for name, row in rows}
        return summary

    def _matches(self, by: By) -> tuple[LatentMatches, ...]:
        return self.by_decoder if by == "decoder" else self.by_activation

    def _comes_back(self, match: LatentMatches) -> Bool[Tensor, "latents"]:
        cut = self.cosine_cut if match.by == "decoder" else self.correlation_cut
        return match.mutual & (match.similarity >= cut)


def seed_stability(
    crosscoder: Crosscoder,
    others: Sequence[Crosscoder],
    *,
    activations: ActivationSource | None = None,
    classes: Sequence[LatentClasses] = (),
    cosine: float = MATCH,
    correlation: float = MATCH,
    progress: Progress = silent,
) -> SeedStability:
    """How many latents of `crosscoder` come back in `others`, crosscoders of the same sources from other seeds.

    `classes` are of the reference and of each other, in that order; give them the density, so that the dead are known.
    """
    if not others or (classes and len(classes) != len(others) + 1):
        raise ConfigError(
            f"expected other crosscoders, and classes for none or for all; got {len(others)} and {len(classes)}.",
            hint="Classes are of the reference first, then of each other.",
        )
    for other in others:
        check_same_writes(crosscoder, other)
    by_activation: tuple[LatentMatches, ...] = ()
    live = torch.ones(crosscoder.num_latents, dtype=torch.bool)
    if activations is not None:
        by_activation = _by_activation(crosscoder, others, activations, progress=progress)
        live = by_activation[0].similarity.isfinite()
    if classes:
        live = live & (classes[0].class_ids.cpu() != CLASSES.index("dead"))
    by_decoder = tuple(decoder_matches(crosscoder, other) for other in others)
    return SeedStability(by_decoder, by_activation, live, tuple(classes), cosine, correlation)


@torch.no_grad()
def _by_activation(
    crosscoder: Crosscoder, others: Sequence[Crosscoder], activations: ActivationSource, *, progress: Progress
) -> tuple[LatentMatches, ...]:
    everyone = [crosscoder, *others]
    for one in everyone:
        check_sources(one, activations)
    sums = [JointSums((crosscoder.num_latents, other.num_latents)) for other in others]
    reads = [Columns(one.sources, one.reads.keys) for one in everyone]
    done = 0
    with ExitStack() as stack:
        for one in everyone:
            stack.enter_context(evaluating(one))
        for batch in activations.contexts():
            parts = zip(everyone, reads, strict=True)
            first, *codes = [one.encode(columns(batch.x.to(one.mean.device))) for one, columns in parts]
            for joint, code in zip(sums, codes, strict=True):
                joint.update(first, code)
            done += batch.x.shape[0]
            progress("matching latents", done, None)
    return tuple(joint.matches() for joint in sums)


def _share(found: Bool[Tensor, "latents"], among: Bool[Tensor, "latents"]) -> float:
    return float(found[among].double().mean()) if among.any() else float("nan")
