"""Wiring: which latents read and write which sources. Every architecture is a list of latent groups, none is a class.

Group g with reads `R_g` and writes `W_g` (columns of the packed row):

    pre_g = x̃[:, R_g] W_enc_gᵀ + b_enc_g        x̂̃[:, W_g] += f_g W_dec_g

Latent ids run through the groups in order. A group has no decoder where it does not write, so none can drift.
Sources: Lindsey et al. 2024, "Sparse Crosscoders" (acausal); an SAE is the case of one source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool

from crosscoder.errors import WiringError
from crosscoder.sources import Source, SourceSet


@dataclass(frozen=True)
class LatentGroup:
    """Latents that read and write the same sources.

    `penalty` multiplies the sparsity coefficient, `k` is the group's own number of active latents per row,
    `tied` shares decoders or their norms across the written sources, `skip` adds an affine path from reads to writes.
    """

    name: str
    num_latents: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tied: Literal["decoder", "norm"] | None = None
    penalty: float = 1.0
    k: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise WiringError(f"expected a group name of letters, digits, '-' and '_'; got {self.name!r}.")
        if self.num_latents < 1:
            raise WiringError(f"expected at least one latent in group {self.name!r}; got {self.num_latents}.")
        if not self.reads or not self.writes:
            raise WiringError(f"expected group {self.name!r} to read and to write at least one source each.")
        if self.k is not None and not 1 <= self.k <= self.num_latents:
            raise WiringError(f"expected 1 <= k <= {self.num_latents} in group {self.name!r}; got {self.k}.")


@dataclass(frozen=True)
class Wiring:
    """Latent groups over a set of sources.

    >>> sources = SourceSet([Source("base", "embed", 2), Source("chat", "embed", 3)])
    >>> w = acausal(sources, num_latents=8)
    >>> w.num_latents, w.groups[0].reads
    (8, ('base/embed', 'chat/embed'))
    """

    sources: SourceSet
    groups: tuple[LatentGroup, ...]

    def __init__(self, sources: SourceSet, groups: Iterable[LatentGroup]) -> None:
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "groups", tuple(groups))
        if not self.groups:
            raise WiringError("expected at least one latent group; got none.")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise WiringError("expected group names to differ.", details=names)
        for group in self.groups:
            self._check(group)

    def __iter__(self) -> Iterator[LatentGroup]:
        return iter(self.groups)

    @property
    def num_latents(self) -> int:
        """Latents of all groups together."""
        return sum(group.num_latents for group in self.groups)

    @cached_property
    def reads(self) -> SourceSet:
        """The sources that any group reads."""
        return self.sources.subset(key for group in self.groups for key in group.reads)

    @cached_property
    def writes(self) -> SourceSet:
        """The sources that any group writes."""
        return self.sources.subset(key for group in self.groups for key in group.writes)

    @cached_property
    def latent_ranges(self) -> tuple[tuple[int, int], ...]:
        """First latent and the one past the last, for every group."""
        stops = [sum(g.num_latents for g in self.groups[: i + 1]) for i in range(len(self.groups))]
        return tuple((stop - group.num_latents, stop) for stop, group in zip(stops, self.groups, strict=True))

    @cached_property
    def writes_mask(self) -> Bool[np.ndarray, "latents sources"]:
        """Which latent has a decoder at which written source: tells "cannot write" from "learned zero"."""
        rows = [[key in group.writes for key in self.writes.keys] for group in self.groups]
        return np.repeat(np.asarray(rows), [group.num_latents for group in self.groups], axis=0)

    def _check(self, group: LatentGroup) -> None:
        for side, keys in (("reads", group.reads), ("writes", group.writes)):
            unknown = [key for key in keys if key not in self.sources]
            if unknown:
                raise WiringError(
                    f"group {group.name!r} {side} sources that are not there.",
                    details=[f"unknown  {key}" for key in unknown] + [f"known    {key}" for key in self.sources.keys],
                )
            if tuple(key for key in self.sources.keys if key in keys) != tuple(keys):
                raise WiringError(
                    f"expected group {group.name!r} to name its {side} once each, in the order of the sources.",
                    details=keys,
                )
        widths = {self.sources[key].width for key in group.writes}
        if group.tied == "decoder" and len(widths) > 1:
            raise WiringError(
                f"expected equal widths where decoders are tied; group {group.name!r} writes widths {sorted(widths)}.",
                hint='Use tied="norm", which allows unequal widths.',
            )


def acausal(sources: SourceSet, *, num_latents: int) -> Wiring:
    """One group that reads and writes every source (Lindsey et al. 2024, section 1)."""
    return Wiring(sources, [LatentGroup("all", num_latents, sources.keys, sources.keys)])


def sae(source: Source, *, num_latents: int) -> Wiring:
    """A sparse autoencoder: the crosscoder of one source."""
    return acausal(SourceSet([source]), num_latents=num_latents)
