"""Wiring: which latents read and write which sources. Every architecture is a list of latent groups, none is a class.

Group g with reads `R_g` and writes `W_g` (columns of the packed row):

    pre_g = x̃[:, R_g] W_enc_gᵀ + b_enc_g        x̂̃[:, W_g] += f_g W_dec_g

Latent ids run through the groups in order. A group has no decoder where it does not write, so none can drift.
Causal order is the order of sites within a model; sources of several models at one site are one *step*.
Sources: Lindsey et al. 2024, "Sparse Crosscoders" (acausal, weakly and strictly causal, local, pre/post MLP); Ameisen
et al. 2025 (cross-layer transcoder); Anthropic, February 2025 (designated shared); Jiralerspong & Bricken 2026
(dedicated).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool

from crosscoder.errors import WiringError
from crosscoder.sources import Source, SourceSet, site_order


@dataclass(frozen=True)
class LatentGroup:
    """Latents that read and write the same sources.

    `penalty` multiplies the sparsity coefficient; `k` is the group's own number of active latents per row, chosen among
    its own. `tied` keeps one decoder for all written sources, or decoders of one norm. `skip` names written sources
    that also get an affine map of the reads (`True`: all that the group does not read).
    """

    name: str
    num_latents: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tied: Literal["decoder", "norm"] | None = None
    penalty: float = 1.0
    k: int | None = None
    skip: tuple[str, ...] | bool = ()

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise WiringError(f"expected a group name of letters, digits, '-' and '_'; got {self.name!r}.")
        if self.num_latents < 1:
            raise WiringError(f"expected at least one latent in group {self.name!r}; got {self.num_latents}.")
        for name in ("reads", "writes", "skip"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise WiringError(f"expected {name} of group {self.name!r} as a tuple of sources; got one word.")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.tied not in (None, "decoder", "norm"):
            raise WiringError(f"expected tied as 'decoder', 'norm' or None in group {self.name!r}; got {self.tied!r}.")
        if not self.reads or not self.writes:
            raise WiringError(f"expected group {self.name!r} to read and to write at least one source each.")
        if self.k is not None and not 1 <= self.k <= self.num_latents:
            raise WiringError(f"expected 1 <= k <= {self.num_latents} in group {self.name!r}; got {self.k}.")
        if not 0 < self.penalty < math.inf:
            raise WiringError(f"expected a penalty above 0 in group {self.name!r}; got {self.penalty}.")
        self._check_skip()

    @property
    def skips(self) -> tuple[str, ...]:
        """The written sources that get an affine map of the reads."""
        if isinstance(self.skip, bool):
            return tuple(key for key in self.writes if key not in self.reads) if self.skip else ()
        return self.skip

    def _check_skip(self) -> None:
        wrong = [key for key in self.skips if key not in self.writes or key in self.reads]
        if wrong or (self.skip is True and not self.skips):
            raise WiringError(
                f"expected group {self.name!r} to skip to sources that it writes and does not read.",
                details=wrong,
                hint="An affine path from a source to itself would be the identity.",
            )


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
            hint = "Wirings that are combined can be told apart: wiring.prefixed('a')."
            raise WiringError("expected group names to differ.", details=names, hint=hint)
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

    def prefixed(self, prefix: str) -> Wiring:
        """The same wiring with `prefix-` before every group's name, so that two alike can be combined."""
        return Wiring(self.sources, [replace(group, name=f"{prefix}-{group.name}") for group in self.groups])

    def over(self, sources: SourceSet) -> Wiring:
        """The same groups among `sources`, which may be more and in another order; weights follow that order.

        Raises WiringError for a source of a group that is not among them.
        """
        used = dict.fromkeys(key for group in self.groups for key in (*group.reads, *group.writes))
        missing = [key for key in used if key not in sources]
        if missing:
            raise WiringError("groups read or write sources that are not there.", details=missing)
        groups = [
            replace(group, reads=_in_order(sources, [group.reads]), writes=_in_order(sources, [group.writes]))
            for group in self.groups
        ]
        return Wiring(sources, groups)

    def untied(self) -> Wiring:
        """The same wiring with a decoder of its own for every latent and source."""
        return Wiring(self.sources, [replace(group, tied=None) for group in self.groups])

    def without_k(self) -> Wiring:
        """The same wiring with no group's own k."""
        return Wiring(self.sources, [replace(group, k=None) for group in self.groups])

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


def transcoder(read: Source, write: Source, *, num_latents: int, skip: bool = False) -> Wiring:
    """One group that predicts one source from another, such as an MLP's output from its input."""
    return Wiring(SourceSet([read, write]), [LatentGroup("all", num_latents, (read.key,), (write.key,), skip=skip)])


def per_source(sources: SourceSet, *, num_latents_per_source: int, k: int | None = None) -> Wiring:
    """Independent sparse autoencoders, one per source; with `k`, each keeps its own k latents per row."""
    groups = [
        LatentGroup(_name(source.key), num_latents_per_source, (source.key,), (source.key,), k=k) for source in sources
    ]
    return Wiring(sources, groups)


def weakly_causal(sources: SourceSet, *, num_latents_per_layer: int, reads: Literal["own", "prefix"] = "own") -> Wiring:
    """One group per step, that reads its own step (or all up to it) and writes its own and every later one."""
    found = steps(sources)
    groups = [
        LatentGroup(
            _name(found[i][0].partition("/")[2]),
            num_latents_per_layer,
            _in_order(sources, found[i : i + 1] if reads == "own" else found[: i + 1]),
            _in_order(sources, found[i:]),
        )
        for i in range(len(found))
    ]
    return Wiring(sources, groups)


def strictly_causal(
    reads: SourceSet,
    writes: SourceSet,
    *,
    num_latents_per_layer: int,
    tied: Literal["decoder", "norm"] | None = None,
    skip: bool = False,
) -> Wiring:
    """A cross-layer transcoder: one group per step of `reads`, that writes all `writes` from there on.

    `tied="decoder"` keeps one decoder per latent for all its targets; `skip` adds an affine map of the reads to the
    first of them: the layer's own, where it has one.
    """
    both = [key for key in reads.keys if key in writes]
    if both:
        raise WiringError(
            "a strictly causal wiring predicts sources that it does not read.",
            details=[f"read and written  {key}" for key in both],
            hint="Use weakly_causal to reconstruct what is read.",
        )
    sources = _union(reads, writes)
    groups: list[LatentGroup] = []
    for step in steps(reads):
        start = _order(reads, step[0])
        targets = [target for target in steps(writes) if _order(writes, target[0]) >= start]
        if not targets:
            raise WiringError(
                f"nothing in the written sources comes at or after {step[0]}.",
                details=[f"written  {key}" for key in writes.keys],
                hint="Read only sites that some written site follows.",
            )
        read, written = _in_order(sources, [step]), _in_order(sources, targets)
        own = targets[0] if skip else ()
        name = _name(step[0].partition("/")[2])
        groups.append(LatentGroup(name, num_latents_per_layer, read, written, tied=tied, skip=own))
    return Wiring(sources, groups)


def mixed(reads: SourceSet, mlp_outs: SourceSet, attn_outs: SourceSet, *, num_latents_per_layer: int) -> Wiring:
    """Strictly causal for MLP outputs together with weakly causal for attention outputs, each of that size.

    Latents of a cross-layer transcoder cannot say what attention moves between positions (Lindsey et al. 2024).
    """
    mlp = strictly_causal(reads, mlp_outs, num_latents_per_layer=num_latents_per_layer)
    attention = weakly_causal(attn_outs, num_latents_per_layer=num_latents_per_layer)
    return combine(mlp.prefixed("mlp"), attention.prefixed("attention"))


def local(sources: SourceSet, *, num_latents_per_layer: int, window: int) -> Wiring:
    """One group per window of adjacent steps, that reads and writes it: SAEs at window 1, acausal at all steps."""
    found = steps(sources)
    if not 1 <= window <= len(found):
        raise WiringError(f"expected a window of 1 to {len(found)} steps; got {window}.")
    starts = range(len(found) - window + 1)
    inside = [_in_order(sources, found[i : i + window]) for i in starts]
    return Wiring(sources, [LatentGroup(f"window-{i}", num_latents_per_layer, inside[i], inside[i]) for i in starts])


def pre_post_mlp(resid_mid: Source, mlp_out: Source, *, num_latents: int) -> Wiring:
    """Latents that read the stream before an MLP, and write it and what the MLP adds: which are newly computed?"""
    sources = SourceSet([resid_mid, mlp_out])
    return Wiring(sources, [LatentGroup("all", num_latents, (resid_mid.key,), sources.keys)])


def designated_shared(
    sources: SourceSet,
    *,
    shared: int,
    free: int,
    penalty: float = 0.1,
    tied: Literal["decoder", "norm"] = "decoder",
    k_shared: int | None = None,
) -> Wiring:
    """Latents with tied decoders and a smaller penalty beside free ones (Anthropic, February 2025).

    The published ratio 0.1–0.2 multiplies one norm of the tied decoder; ours multiplies the sum over S sources, so that
    0.1 over two sources is 0.2 there. Under TopK and BatchTopK give `penalty=1.0` and, if wanted, `k_shared`.
    """
    keys = sources.keys
    groups = [
        LatentGroup("shared", shared, keys, keys, tied=tied, penalty=penalty, k=k_shared),
        LatentGroup("free", free, keys, keys),
    ]
    return Wiring(sources, groups)


def dedicated(
    sources: SourceSet, *, shared: int, exclusive: Mapping[str, int], k_exclusive: Mapping[str, int] | None = None
) -> Wiring:
    """Latents of all sources beside latents of one model alone, which read and write nothing else.

    `exclusive` maps models' aliases to numbers of latents (Jiralerspong & Bricken 2026: 5 % each, 90 % shared).
    """
    budget = k_exclusive or {}
    named = dict.fromkeys([*exclusive, *budget])
    unknown = [alias for alias in named if alias not in sources.models or alias not in exclusive]
    if unknown or not exclusive:
        raise WiringError(
            "expected latents exclusive to models that are among the sources.",
            details=[*(f"unknown  {alias}" for alias in unknown), *(f"known    {alias}" for alias in sources.models)],
        )
    if "shared" in exclusive:
        raise WiringError("the shared latents' group is called 'shared': give that model another alias.")
    groups = [LatentGroup("shared", shared, sources.keys, sources.keys)]
    for alias, num_latents in exclusive.items():
        own = tuple(source.key for source in sources if source.model == alias)
        groups.append(LatentGroup(alias, num_latents, own, own, k=budget.get(alias)))
    return Wiring(sources, groups)


def combine(*wirings: Wiring) -> Wiring:
    """All groups of all wirings over the union of their sources; `prefixed` keeps names apart."""
    if not wirings:
        raise WiringError("expected at least one wiring to combine; got none.")
    sources = _union(*(wiring.sources for wiring in wirings))
    return Wiring(sources, [group for wiring in wirings for group in wiring.over(sources)])


def steps(sources: SourceSet) -> list[tuple[str, ...]]:
    """The sources in causal order, those at one site of several models together."""
    orders = sorted({site_order(source.site) for source in sources})
    return [tuple(source.key for source in sources if site_order(source.site) == order) for order in orders]


def _order(sources: SourceSet, key: str) -> tuple[int, int]:
    return site_order(sources[key].site)


def _in_order(sources: SourceSet, parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    wanted = {key for part in parts for key in part}
    return tuple(key for key in sources.keys if key in wanted)


def _union(*sets: SourceSet) -> SourceSet:
    found: dict[str, Source] = {}
    for source in (source for sources in sets for source in sources):
        if found.setdefault(source.key, source) != source:
            raise WiringError(
                f"{source.key} is one thing in one wiring, and another in the next.",
                details=[repr(found[source.key]), repr(source)],
            )
    return SourceSet(found.values())


def _name(text: str) -> str:
    """A source key or site as the name of a group."""
    return text.replace("/", "-").replace(".", "-")
