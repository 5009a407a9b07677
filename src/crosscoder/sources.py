"""Sources: named places in language models, and how a row packs their activations side by side.

A source is one *site* of one *model*: `chat/layers.13.resid_post`. A `SourceSet` fixes an order; packed activations
`x` have shape (rows, D) with `D = Σ_s d_s`, source s in the columns `slices[key]`. Widths may differ.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jaxtyping import Float

from crosscoder.errors import SourceMismatch, UnknownSource, UnsupportedSite

if TYPE_CHECKING:
    from torch import Tensor

SITE_KINDS = ("attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
_LAYER_SITE = re.compile(rf"^layers\.(0|[1-9]\d*)\.({'|'.join((*SITE_KINDS, 'resid_pre'))})$")
_ALIAS = re.compile(r"^[A-Za-z0-9_-]+$")


def canonical_site(site: str) -> str:
    """The site's own name: `layers.6.resid_pre` is `layers.5.resid_post`, and `embed` for layer 0."""
    match = _LAYER_SITE.match(site)
    if site == "embed" or (match and match[2] != "resid_pre"):
        return site
    if match is None:
        raise UnsupportedSite(
            f"expected a site such as layers.6.resid_post; got {site!r}.",
            details=["embed", *(f"layers.N.{kind}" for kind in SITE_KINDS)],
            hint="Write one of these, with a layer number for N.",
        )
    layer = int(match[1])
    return "embed" if layer == 0 else f"layers.{layer - 1}.resid_post"


def site_order(site: str) -> tuple[int, int]:
    """Where a site lies in the forward pass: sorts sites of one model causally."""
    site = canonical_site(site)
    if site == "embed":
        return (-1, 0)
    _, layer, kind = site.split(".")
    return (int(layer), SITE_KINDS.index(kind))


@dataclass(frozen=True)
class Source:
    """One site of one model, with its width.

    >>> Source("base", "layers.3.resid_post", 256).key
    'base/layers.3.resid_post'
    """

    model: str
    site: str
    width: int
    difference: tuple[str, str] | None = None
    """Keys of the two sources whose difference, first minus second, a derived source is."""

    def __post_init__(self) -> None:
        if not _ALIAS.match(self.model):
            raise UnknownSource(
                f"expected a model alias of letters, digits, '-' and '_'; got {self.model!r}.",
                hint="Name the model by a short alias, such as base or chat.",
            )
        if self.width < 1:
            raise SourceMismatch(f"expected a width of at least 1 for {self.model}/{self.site}; got {self.width}.")
        object.__setattr__(self, "site", canonical_site(self.site))

    @property
    def key(self) -> str:
        """`model/site`, the source's name in files and dictionaries."""
        return f"{self.model}/{self.site}"

    @classmethod
    def parse(cls, key: str, *, width: int) -> Source:
        """The source called `key`."""
        return cls(*split_key(key), width)


def difference(a: Source, b: Source) -> Source:
    """The derived source `x_a − x_b`, called `a-b/site`; raises SourceMismatch unless site and width are the same.

    >>> difference(Source("chat", "embed", 8), Source("base", "embed", 8)).key
    'chat-base/embed'
    """
    if a.difference is not None or b.difference is not None:
        raise SourceMismatch("a difference is of two sources that models have, not of other differences.")
    if a.key == b.key or a.site != b.site or a.width != b.width:
        raise SourceMismatch(
            "a difference needs one site of two models, of one width.",
            details=[f"{source.key}  width {source.width}" for source in (a, b)],
        )
    return Source(f"{a.model}-{b.model}", a.site, a.width, difference=(a.key, b.key))


def split_key(key: str) -> tuple[str, str]:
    """Model alias and canonical site of a source key."""
    model, slash, site = key.partition("/")
    if not slash:
        raise UnknownSource(
            f"expected a source as model/site; got {key!r}.", hint="Write for example base/layers.6.resid_post."
        )
    return model, canonical_site(site)


@dataclass(frozen=True)
class SourceSet:
    """Sources in a fixed order, and the packing of their activations.

    >>> sources = SourceSet([Source("base", "embed", 2), Source("chat", "embed", 3)])
    >>> sources.width, sources.slices["chat/embed"]
    (5, slice(2, 5, None))
    """

    sources: tuple[Source, ...]

    def __init__(self, sources: Iterable[Source]) -> None:
        object.__setattr__(self, "sources", tuple(sources))
        if not self.sources:
            raise UnknownSource("expected at least one source; got none.", hint="Name one as model/site.")
        repeated = sorted({key for key in self.keys if self.keys.count(key) > 1})
        if repeated:
            raise SourceMismatch("expected distinct sources; some are named twice.", details=repeated)

    def __iter__(self) -> Iterator[Source]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def __getitem__(self, key: str) -> Source:
        if key in self.keys:
            return self.sources[self.keys.index(key)]
        near = difflib.get_close_matches(key, self.keys, n=1)
        raise UnknownSource(
            f"no source is called {key!r}.",
            details=self.keys,
            hint=f"Did you mean {near[0]}?" if near else "Name one of these.",
        )

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The sources' names, in order."""
        return tuple(source.key for source in self.sources)

    @property
    def models(self) -> tuple[str, ...]:
        """The models' aliases, in order of first appearance."""
        return tuple(dict.fromkeys(source.model for source in self.sources))

    @property
    def widths(self) -> tuple[int, ...]:
        """`d_s` for every source."""
        return tuple(source.width for source in self.sources)

    @property
    def width(self) -> int:
        """`D = Σ_s d_s`, the width of a packed row."""
        return sum(self.widths)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The columns of every source in a packed row."""
        stops = [sum(self.widths[: i + 1]) for i in range(len(self))]
        pairs = zip(self.sources, stops, strict=True)
        return {source.key: slice(stop - source.width, stop) for source, stop in pairs}

    @cached_property
    def underlying(self) -> SourceSet:
        """The sources that models have: these, with the parts of every difference in its place."""
        found: dict[str, Source] = {}
        for source in self:
            parts = (
                [source]
                if source.difference is None
                else [Source.parse(k, width=source.width) for k in source.difference]
            )
            found.update({part.key: part for part in parts})
        return SourceSet(found.values())

    def derive(self, activations: Mapping[str, Float[Tensor, "rows _"]]) -> Float[Tensor, "rows width"]:
        """Rows packed over this set from the activations of `underlying`: differences are taken here."""
        parts = {key: activations[key] for key in self.keys if self[key].difference is None}
        for source in self:
            if source.difference is not None:
                a, b = source.difference
                parts[source.key] = activations[a] - activations[b]
        return self.pack(parts)

    def index(self, key: str) -> int:
        """The place of the source called `key`."""
        return self.keys.index(self[key].key)

    def subset(self, keys: Iterable[str]) -> SourceSet:
        """The named sources, in this set's order."""
        wanted = {self[key].key for key in keys}
        return SourceSet(source for source in self if source.key in wanted)

    def columns(self, keys: Iterable[str]) -> tuple[int, ...]:
        """The packed columns of the named sources, in this set's order."""
        return tuple(c for source in self.subset(keys) for c in range(*self.slices[source.key].indices(self.width)))

    def resolve(self, name: str) -> Source:
        """The source called `name`: a key, or the alias of a model that has one source here."""
        of_model = [source for source in self if source.model == name]
        if name in self.models and len(of_model) != 1:
            raise UnknownSource(
                f"{name!r} has {len(of_model)} sources here; one was expected.",
                details=[source.key for source in of_model],
                hint="Name one of them in full.",
            )
        return of_model[0] if of_model else self[name]

    def pack(self, activations: Mapping[str, Float[Tensor, "rows _"]]) -> Float[Tensor, "rows width"]:
        """All sources side by side; raises SourceMismatch unless exactly these sources come, each in its width."""
        import torch

        self._check(activations)
        return torch.cat([activations[key] for key in self.keys], dim=-1)

    def unpack(self, x: Float[Tensor, "rows width"]) -> dict[str, Float[Tensor, "rows _"]]:
        """The inverse of `pack`: views of the packed columns."""
        if x.shape[-1] != self.width:
            raise SourceMismatch(
                f"expected packed rows of width {self.width}; got {x.shape[-1]}.", details=self.describe()
            )
        return {key: x[..., columns] for key, columns in self.slices.items()}

    def describe(self) -> list[str]:
        """One line per source: its name and width."""
        return [f"{source.key}  width {source.width}" for source in self]

    def _check(self, activations: Mapping[str, Tensor]) -> None:
        missing = [f"missing  {key}" for key in self.keys if key not in activations]
        extra = [f"unknown  {key}" for key in activations if key not in self.keys]
        wrong = [
            f"width    {source.key}: expected {source.width}, got {activations[source.key].shape[-1]}"
            for source in self
            if source.key in activations and activations[source.key].shape[-1] != source.width
        ]
        if missing or extra or wrong:
            raise SourceMismatch(
                f"expected activations of {len(self)} sources; got {len(activations)}.",
                details=[*missing, *extra, *wrong],
                hint="Give one tensor (rows, width) for each source, under its key.",
            )
