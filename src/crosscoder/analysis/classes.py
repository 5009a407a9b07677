"""Which latents belong to one source, to the other, or to both: by the norms of their decoder rows.

With `n_a = ‖d_i^a‖` and `n_b = ‖d_i^b‖` in normalised space (Minder et al. 2025, section 3.1)

    relative_norm = ½ ((n_b − n_a) / max(n_a, n_b) + 1)        0: a alone, ½: equal, 1: b alone

and the older share `n_b / (n_a + n_b)` (Lindsey et al. 2024), which cut-offs of other papers refer to. All published
cut-offs are set by hand: what a number of latents beyond them means is only known beside a null pair (`controls`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.sources import Source

CLASSES = ("a-only", "shared", "b-only", "other", "dead", "elsewhere")
"""Names of the classes; a latent's class is an index into this. `elsewhere`: it can write neither source."""

_TWIN_BLOCK = 2048


@dataclass(frozen=True)
class CutOffs:
    """Where the classes begin: below `a_only`, from `shared[0]` to `shared[1]`, above `b_only`; `other` lies between.

    `statistic` is what they cut: `relative_norm` or `share`.
    """

    a_only: float
    shared: tuple[float, float]
    b_only: float
    statistic: Literal["relative_norm", "share"] = "relative_norm"


CUTOFFS: Mapping[str, CutOffs] = MappingProxyType(
    {
        "default": CutOffs(0.1, (0.4, 0.6), 0.9),
        "minder": CutOffs(0.1, (0.4, 0.6), 0.9),
        "anthropic": CutOffs(0.05, (0.05, 0.95), 0.95, "share"),
        "dfc": CutOffs(0.2, (0.2, 0.8), 0.8, "share"),
    }
)
"""Published cut-offs by name: Minder et al. 2025 (ours too); Anthropic, Feb. 2025; dedicated-feature crosscoders."""


@dataclass(frozen=True)
class LatentClasses:
    """Norms, relative norm, cosine and class of every latent between the sources `a` and `b`.

    `cosine` is None where the widths of the sources differ: there is no angle between vectors of two spaces; it is NaN
    for a latent that cannot write both. `by_wiring` says whose norms the wiring fixed: it writes one of the two alone,
    or has one norm for both. Their class is no finding.
    """

    a: str
    b: str
    cutoffs: CutOffs
    norm_a: Float[Tensor, "latents"]
    norm_b: Float[Tensor, "latents"]
    relative_norm: Float[Tensor, "latents"]
    cosine: Float[Tensor, "latents"] | None
    class_ids: Int[Tensor, "latents"]
    by_wiring: Bool[Tensor, "latents"]

    @property
    def counts_by_wiring(self) -> dict[str, int]:
        """How many latents of each class the wiring put there."""
        found = torch.bincount(self.class_ids[self.by_wiring], minlength=len(CLASSES)).tolist()
        return {name: count for name, count in zip(CLASSES, found, strict=True) if count}

    @property
    def counts(self) -> dict[str, int]:
        """How many latents each class has."""
        found = torch.bincount(self.class_ids, minlength=len(CLASSES)).tolist()
        return dict(zip(CLASSES, found, strict=True))

    def latents(self, name: str) -> Int[Tensor, "some"]:
        """The latents of one class."""
        return (self.class_ids == CLASSES.index(name)).nonzero().squeeze(1)

    def learned(self, name: str) -> Int[Tensor, "some"]:
        """Those of one class that training put there, not the wiring."""
        return ((self.class_ids == CLASSES.index(name)) & ~self.by_wiring).nonzero().squeeze(1)

    def table(self) -> pa.Table:
        """One row per latent."""
        cosine = [None] * len(self.norm_a) if self.cosine is None else _or_none(self.cosine)
        return pa.table(
            {
                "latent": pa.array(range(len(self.norm_a)), pa.int32()),
                "class": pa.array([CLASSES[i] for i in self.class_ids.tolist()]),
                "relative_norm": pa.array(_or_none(self.relative_norm), pa.float32()),
                "norm_a": pa.array(self.norm_a.tolist(), pa.float32()),
                "norm_b": pa.array(self.norm_b.tolist(), pa.float32()),
                "cosine": pa.array(cosine, pa.float32()),
                "by_wiring": pa.array(self.by_wiring.tolist(), pa.bool_()),
            }
        )


@dataclass(frozen=True)
class Twins:
    """Pairs of an a-only and a b-only latent that point the same way, most similar first: one concept counted twice."""

    a: str
    b: str
    latents_a: Int[Tensor, "pairs"]
    latents_b: Int[Tensor, "pairs"]
    cosine: Float[Tensor, "pairs"]

    def table(self) -> pa.Table:
        """One row per pair."""
        return pa.table(
            {
                "latent_a": pa.array(self.latents_a.tolist(), pa.int32()),
                "latent_b": pa.array(self.latents_b.tolist(), pa.int32()),
                "cosine": pa.array(self.cosine.tolist(), pa.float32()),
            }
        )


@torch.no_grad()
def latent_classes(
    crosscoder: Crosscoder,
    *,
    a: str,
    b: str,
    cutoffs: str | CutOffs = "default",
    density: Float[Tensor, "latents"] | None = None,
) -> LatentClasses:
    """The class of every latent between two written sources, in normalised space.

    `a` and `b` are source keys, or aliases of models with one source. With the `density` on an analysis set, latents
    that never fired there are `dead`. `cutoffs` is a name in `CUTOFFS` or cut-offs of your own.
    """
    source_a, source_b = source_pair(crosscoder, a=a, b=b)
    cuts = named_cutoffs(cutoffs)
    norms = crosscoder.decoder_norms("normalised")
    norm_a = norms[:, crosscoder.writes.index(source_a.key)]
    norm_b = norms[:, crosscoder.writes.index(source_b.key)]
    relative = relative_norm(norm_a, norm_b)
    cut = relative if cuts.statistic == "relative_norm" else norm_b / (norm_a + norm_b)
    writes = torch.from_numpy(crosscoder.wiring.writes_mask).to(norm_a.device)
    writes = writes[:, [crosscoder.writes.index(s.key) for s in (source_a, source_b)]]
    dead = torch.zeros_like(norm_a, dtype=torch.bool) if density is None else (density == 0).to(norm_a.device)
    rows_a, rows_b = crosscoder.decoder_rows(source_a.key), crosscoder.decoder_rows(source_b.key)
    return LatentClasses(
        a=source_a.key,
        b=source_b.key,
        cutoffs=cuts,
        norm_a=norm_a,
        norm_b=norm_b,
        relative_norm=relative,
        cosine=_cosine(rows_a, rows_b, both=writes.all(1)) if source_a.width == source_b.width else None,
        class_ids=_class_ids(cut, cuts, dead=dead, elsewhere=~writes.any(1)),
        by_wiring=~writes.all(1) | _tied(crosscoder).to(norm_a.device),
    )


def relative_norm(norm_a: Float[Tensor, "latents"], norm_b: Float[Tensor, "latents"]) -> Float[Tensor, "latents"]:
    """`½ ((n_b − n_a) / max(n_a, n_b) + 1)`; NaN where both are zero."""
    return ((norm_b - norm_a) / torch.maximum(norm_a, norm_b) + 1) / 2


@torch.no_grad()
def twins(crosscoder: Crosscoder, *, a: str, b: str, cosine: float = 0.9, cutoffs: str | CutOffs = "default") -> Twins:
    """Pairs (a-only i, b-only j) with `cos(d_i^a, d_j^b) >= cosine`: one concept that was split in two.

    Minder et al. 2025, section 3.2 ("latent decoupling"). Raises SourceMismatch where the widths differ.
    """
    classes = latent_classes(crosscoder, a=a, b=b, cutoffs=cutoffs)
    if classes.cosine is None:
        raise SourceMismatch(
            f"twins compare directions of {classes.a} and {classes.b}, which need equal widths.",
            details=crosscoder.writes.describe(),
        )
    only_a, only_b = classes.latents("a-only"), classes.latents("b-only")
    rows_a = normalize(crosscoder.decoder_rows(classes.a)[only_a], dim=1)
    rows_b = normalize(crosscoder.decoder_rows(classes.b)[only_b], dim=1)
    hits = [_pairs_above(block @ rows_b.T, cosine) for block in rows_a.split(_TWIN_BLOCK)]
    offsets = range(0, max(1, len(rows_a)), _TWIN_BLOCK)  # no rows are split into one empty block
    i = torch.cat([rows + offset for offset, (rows, _, _) in zip(offsets, hits, strict=True)])
    j, value = torch.cat([hit[1] for hit in hits]), torch.cat([hit[2] for hit in hits])
    order = value.argsort(descending=True, stable=True)
    return Twins(classes.a, classes.b, only_a[i[order]], only_b[j[order]], value[order])


def source_pair(crosscoder: Crosscoder, *, a: str, b: str) -> tuple[Source, Source]:
    """The two different written sources that `a` and `b` name."""
    source_a, source_b = crosscoder.writes.resolve(a), crosscoder.writes.resolve(b)
    if source_a == source_b:
        raise SourceMismatch(
            f"expected two sources to compare; {a!r} and {b!r} are both {source_a.key}.",
            details=crosscoder.writes.describe(),
            hint="Name two different ones.",
        )
    return source_a, source_b


def named_cutoffs(cutoffs: str | CutOffs) -> CutOffs:
    """The cut-offs of that name, or those given."""
    if isinstance(cutoffs, CutOffs):
        return cutoffs
    if cutoffs not in CUTOFFS:
        raise ConfigError(f"no cut-offs are called {cutoffs!r}.", details=list(CUTOFFS), hint="Name one of these.")
    return CUTOFFS[cutoffs]


def _or_none(values: Float[Tensor, "latents"]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _cosine(rows_a: Tensor, rows_b: Tensor, *, both: Bool[Tensor, "latents"]) -> Float[Tensor, "latents"]:
    return torch.where(both, cosine_similarity(rows_a, rows_b, dim=1), torch.nan)


def _tied(crosscoder: Crosscoder) -> Bool[Tensor, "latents"]:
    return torch.cat([torch.full((group.num_latents,), group.tied is not None) for group in crosscoder.wiring])


def _class_ids(
    cut: Float[Tensor, "latents"],
    cuts: CutOffs,
    *,
    dead: Bool[Tensor, "latents"],
    elsewhere: Bool[Tensor, "latents"],
) -> Int[Tensor, "latents"]:
    ids = torch.full(cut.shape, CLASSES.index("other"), device=cut.device)
    ids[(cut >= cuts.shared[0]) & (cut <= cuts.shared[1])] = CLASSES.index("shared")
    ids[cut < cuts.a_only] = CLASSES.index("a-only")
    ids[cut > cuts.b_only] = CLASSES.index("b-only")
    ids[dead] = CLASSES.index("dead")
    ids[elsewhere] = CLASSES.index("elsewhere")
    return ids


def _pairs_above(cosines: Float[Tensor, "rows columns"], least: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = (cosines >= least).nonzero(as_tuple=True)
    return rows, columns, cosines[rows, columns]
