"""Latents over an ordered list of sources, such as checkpoints of one model: when they come, how they turn, and go.

With `n_i^s = ‖d_i^s‖` in normalised space, at sources s = 0 … S−1 in their order

    profile_i^s = n_i^s / max_t n_i^t             present_i^s = profile_i^s >= cut     (½ unless another is given)
    emergence_i = the first s with present        decline_i   = the s after the last one with present, S where it stays
    turn_i^s    = cos(d_i^s, d_i^s+1)             to_last_i^s = cos(d_i^s, d_i^S−1)

    steady      present everywhere, with min_s profile_i^s at or above `steady`
    always      present everywhere, otherwise
    emerging    absent, then present to the end          fading      present, then absent to the end
    transient   absent, present, absent                  recurring   absent in between
    dead        no norm, or not active on the analysis set

and, against all others at once, `share_i^s = n_i^s / Σ_t n_i^t`, which is 1/S for a latent that is alike everywhere and
for two sources the share of Lindsey et al. 2024 (Crosscoding Through Time, 2026: relative decoder norm, one vs all).

Norms curves and turns: Evolution of Concepts, 2025. Classes, decline and the default cuts are ours. Norms have the
same flaws here as between two models: they tell what a latent can write, and not that the concept is not there
otherwise. `relative_indirect_effect` (interventions) asks the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch

EMERGENCE_CLASSES = ("steady", "always", "emerging", "fading", "transient", "recurring", "dead")
"""Names of the classes; a latent's class is an index into this."""
PRESENT = 0.5
STEADY = 0.8


@dataclass(frozen=True)
class Emergence:
    """What becomes of every latent along `sources`, which are in order.

    `emergence` and `decline` are places in `sources`; for a dead latent −1. `turn` and `to_last` are cosines, NaN where
    one of the two norms is zero or widths differ. `by_wiring` says that a latent cannot write some of the sources: its
    class is no finding.
    """

    sources: tuple[str, ...]
    cut: float
    steady: float
    norms: Float[Tensor, "latents sources"]
    profile: Float[Tensor, "latents sources"]
    emergence: Int[Tensor, "latents"]
    decline: Int[Tensor, "latents"]
    turn: Float[Tensor, "latents intervals"]
    to_last: Float[Tensor, "latents sources"]
    class_ids: Int[Tensor, "latents"]
    by_wiring: Bool[Tensor, "latents"]

    @property
    def counts(self) -> dict[str, int]:
        """How many latents each class has."""
        found = torch.bincount(self.class_ids, minlength=len(EMERGENCE_CLASSES)).tolist()
        return dict(zip(EMERGENCE_CLASSES, found, strict=True))

    @property
    def num_present(self) -> list[int]:
        """How many latents are present at each source."""
        return ((self.profile >= self.cut) & self._alive[:, None]).sum(0).tolist()

    @property
    def num_emerged(self) -> list[int]:
        """How many latents are first present at each source; at the first one, those that were there before."""
        return _counted(self.emergence[self._alive], len(self.sources))

    @property
    def num_declined(self) -> list[int]:
        """How many latents are no longer present from each source on."""
        return _counted(self.decline[self._alive], len(self.sources))

    def latents(self, name: str) -> Int[Tensor, "some"]:
        """The latents of one class."""
        return (self.class_ids == EMERGENCE_CLASSES.index(name)).nonzero().squeeze(1)

    def table(self) -> pa.Table:
        """One row per latent: class, where it emerges and declines, and its curve."""
        columns: dict[str, Any] = {
            "latent": pa.array(range(len(self.class_ids)), pa.int32()),
            "emergence_class": pa.array([EMERGENCE_CLASSES[i] for i in self.class_ids.tolist()]),
            "emergence": pa.array([self._name(i) for i in self.emergence.tolist()], pa.string()),
            "decline": pa.array([self._name(i) for i in self.decline.tolist()], pa.string()),
            "by_wiring": pa.array(self.by_wiring.tolist(), pa.bool_()),
        }
        for name, values in (("norm_normalised", self.norms), ("profile", self.profile), ("to_last", self.to_last)):
            columns |= {f"{name}/{key}": _column(c) for key, c in zip(self.sources, values.T, strict=True)}
        return pa.table(
            columns | {f"turn/{key}": _column(c) for key, c in zip(self.sources, self.turn.T, strict=False)}
        )

    def to_json(self) -> dict[str, Any]:
        """Counts by class and by source, and how far directions turn from each source to the next."""
        return {
            "sources": list(self.sources),
            "space": "normalised",
            "present_at": self.cut,
            "steady_at": self.steady,
            "classes": self.counts,
            "num_by_wiring": int(self.by_wiring.sum()),
            "num_present": self.num_present,
            "num_emerged": self.num_emerged,
            "num_declined": self.num_declined,
            "median_turn": [_median(turn[present]) for turn, present in zip(self.turn.T, self._both, strict=True)],
        }

    @property
    def _alive(self) -> Bool[Tensor, "latents"]:
        return self.class_ids != EMERGENCE_CLASSES.index("dead")

    @property
    def _both(self) -> list[Tensor]:
        """By interval, which latents are present at both of its ends."""
        present = (self.profile >= self.cut) & self._alive[:, None]
        return list((present[:, 1:] & present[:, :-1]).T)

    def _name(self, place: int) -> str | None:
        return self.sources[place] if 0 <= place < len(self.sources) else None


@dataclass(frozen=True)
class OneAgainstAll:
    """The share that each of several sources has in a latent's norms; rows sum to 1, NaN for a latent without norm."""

    sources: tuple[str, ...]
    share: Float[Tensor, "latents sources"]

    @property
    def largest(self) -> Int[Tensor, "latents"]:
        """The source with the largest share, as a place in `sources`; −1 for a latent without norm."""
        return torch.where(self.share[:, 0].isnan(), -1, self.share.nan_to_num().argmax(1))

    def table(self) -> pa.Table:
        """One row per latent."""
        columns = {f"share/{key}": _column(c) for key, c in zip(self.sources, self.share.T, strict=True)}
        return pa.table({"latent": pa.array(range(len(self.share)), pa.int32())} | columns)

    def to_json(self) -> dict[str, Any]:
        """By source, the mean share and how many latents have their largest one there."""
        living = self.largest >= 0
        counts = _counted(self.largest[living], len(self.sources))
        return {
            "sources": list(self.sources),
            "space": "normalised",
            "mean_share": dict(zip(self.sources, self.share[living].mean(0).tolist(), strict=True)),
            "num_latents_largest": dict(zip(self.sources, counts, strict=True)),
        }


@torch.no_grad()
def emergence(
    crosscoder: Crosscoder,
    sources: Sequence[str] | None = None,
    *,
    cut: float = PRESENT,
    steady: float = STEADY,
    density: Float[Tensor, "latents"] | None = None,
) -> Emergence:
    """What becomes of every latent along `sources`, written ones in their order; by default all that are written.

    A source is named by key, or by the alias of a model with one. With the `density` on an analysis set, latents that
    never fired there are dead.
    """
    if not 0 < cut <= steady <= 1:
        raise ConfigError(f"expected 0 < cut <= steady <= 1; got cut {cut} and steady {steady}.")
    keys = _keys(crosscoder, sources)
    norms = _norms(crosscoder, keys)
    top = norms.amax(1)
    profile = norms / top[:, None].clamp(min=torch.finfo(norms.dtype).tiny)
    dead = (top == 0) | (torch.zeros_like(top, dtype=torch.bool) if density is None else density.to(top.device) == 0)
    present = (profile >= cut) & ~dead[:, None]
    places = torch.arange(len(keys))
    writes = torch.from_numpy(crosscoder.wiring.writes_mask)[:, [crosscoder.writes.index(key) for key in keys]]
    return Emergence(
        sources=keys,
        cut=cut,
        steady=steady,
        norms=norms,
        profile=profile,
        emergence=torch.where(dead, -1, present.int().argmax(1)),
        decline=torch.where(dead, -1, torch.where(present, places + 1, 0).amax(1)),
        turn=torch.stack([_cosine(crosscoder, a, b) for a, b in zip(keys, keys[1:], strict=False)], dim=1),
        to_last=torch.stack([_cosine(crosscoder, key, keys[-1]) for key in keys], dim=1),
        class_ids=_class_ids(present, profile.amin(1) >= steady, dead=dead),
        by_wiring=~writes.all(1),
    )


@torch.no_grad()
def one_against_all(crosscoder: Crosscoder, sources: Sequence[str] | None = None) -> OneAgainstAll:
    """The share of every source in the norms of every latent: the relative norm of two sources, for any number."""
    keys = _keys(crosscoder, sources)
    norms = _norms(crosscoder, keys)
    return OneAgainstAll(keys, norms / norms.sum(1, keepdim=True))


def _keys(crosscoder: Crosscoder, sources: Sequence[str] | None) -> tuple[str, ...]:
    named = crosscoder.writes.keys if sources is None else sources
    keys = tuple(crosscoder.writes.resolve(name).key for name in named)
    if len(keys) < 2 or len(set(keys)) < len(keys):
        raise SourceMismatch(
            f"expected two or more different sources that are written; got {', '.join(keys) or 'none'}.",
            details=crosscoder.writes.describe(),
            hint="Name each once, in order: the earliest first.",
        )
    return keys


def _norms(crosscoder: Crosscoder, keys: Sequence[str]) -> Float[Tensor, "latents sources"]:
    return crosscoder.decoder_norms("normalised").cpu()[:, [crosscoder.writes.index(key) for key in keys]]


def _cosine(crosscoder: Crosscoder, a: str, b: str) -> Float[Tensor, "latents"]:
    """NaN where there is no angle."""
    rows_a, rows_b = (crosscoder.decoder_rows(key).cpu() for key in (a, b))
    if rows_a.shape != rows_b.shape:
        return torch.full((len(rows_a),), torch.nan)
    there = (rows_a.norm(dim=1) > 0) & (rows_b.norm(dim=1) > 0)
    return torch.where(there, cosine_similarity(rows_a, rows_b, dim=1, eps=torch.finfo(rows_a.dtype).tiny), torch.nan)


def _class_ids(
    present: Bool[Tensor, "latents sources"], steady: Bool[Tensor, "latents"], *, dead: Bool[Tensor, "latents"]
) -> Int[Tensor, "latents"]:
    changes = (present[:, 1:] != present[:, :-1]).sum(1)
    first, last = present[:, 0], present[:, -1]
    ids = torch.full(dead.shape, EMERGENCE_CLASSES.index("recurring"))
    ids[changes == 0] = EMERGENCE_CLASSES.index("always")
    ids[(changes == 0) & steady] = EMERGENCE_CLASSES.index("steady")
    ids[(changes == 1) & last] = EMERGENCE_CLASSES.index("emerging")
    ids[(changes == 1) & first] = EMERGENCE_CLASSES.index("fading")
    ids[(changes == 2) & ~first & ~last] = EMERGENCE_CLASSES.index("transient")
    ids[dead] = EMERGENCE_CLASSES.index("dead")
    return ids


def _counted(places: Int[Tensor, "some"], num_sources: int) -> list[int]:
    """By source; what lies after the last one is not counted."""
    return torch.bincount(places, minlength=num_sources + 1)[:num_sources].tolist()


def _column(values: Float[Tensor, "latents"]) -> pa.Array:
    return pa.array(values.float().numpy(), from_pandas=True)


def _median(values: Float[Tensor, "some"]) -> float | None:
    values = values[~values.isnan()]
    return float(values.median()) if len(values) else None
