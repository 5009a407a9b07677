"""The truth of a world: where every concept lives, how it points there, how often it fires.

Directions are drawn for the first source (unit vectors) and handed from source to source by the views:

    same        d' = d
    turned      d' = cos θ d + sin θ n,  n a random unit vector at a right angle to d
    rotation    d' = Q d,  Q orthogonal
    linear map  d' = s (A d + b),  A_ij ~ N(0, ¼),  b ~ N(0, τ²),  s keeps the median norm (Jiralerspong & Bricken 2026)
    independent d' new

then multiplied by the concept's strength at the source, and by 0 where it does not live. Everything is drawn from
Philox by (seed, name), so that no number depends on the order in which things are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from crosscoder.errors import ConfigError
from crosscoder.sources import SourceSet
from crosscoder.synthetic.description import (
    ConceptGroup,
    Constant,
    Correlation,
    Decaying,
    Exponential,
    Independent,
    LinearMap,
    LogUniform,
    Rotation,
    Same,
    Turned,
    Uniform,
    WorldConfig,
)


@dataclass(frozen=True)
class Truth:
    """What was planted. Concepts run through the groups in order.

    `directions[source]` is zero where a concept does not live; `frequencies` are fractions of rows; `mean_magnitudes`
    are over the rows where a concept fires; `parents` is None for a concept that fires by itself.
    """

    sources: SourceSet
    directions: Mapping[str, Float[Tensor, "concepts _"]]
    presence: Bool[Tensor, "concepts sources"]
    frequencies: Float[Tensor, "concepts"]
    mean_magnitudes: Float[Tensor, "concepts"]
    groups: tuple[str, ...]
    parents: tuple[int | None, ...]

    @property
    def num_concepts(self) -> int:
        """How many concepts there are."""
        return len(self.groups)

    @property
    def packed(self) -> Float[Tensor, "concepts width"]:
        """Directions at all sources side by side."""
        return torch.cat([self.directions[key] for key in self.sources.keys], dim=1)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """`shared` (lives everywhere), `exclusive to <source>`, or `partial` (in some sources, not in all)."""
        return tuple(_kind(row, self.sources.keys) for row in self.presence.tolist())

    @property
    def shared(self) -> Bool[Tensor, "concepts"]:
        """Concepts that live at every source."""
        return self.presence.all(1)

    def exclusive_to(self, source: str, *, against: str | None = None) -> Bool[Tensor, "concepts"]:
        """Concepts that live at `source` and at no other; with `against`, and not at that one."""
        own = self.presence[:, self._column(source)]
        if against is not None:
            return own & ~self.presence[:, self._column(against)]
        return own & (self.presence.sum(1) == 1)

    @cached_property
    def span(self) -> Int[Tensor, "concepts 2"]:
        """First and last source where a concept lives, as places in the list of sources."""
        last = self.presence.shape[1] - 1 - self.presence.int().flip(1).argmax(1)
        return torch.stack([self.presence.int().argmax(1), last], dim=1)

    @cached_property
    def drift(self) -> Float[Tensor, "concepts"]:
        """Angle in degrees between a concept's directions at the ends of its span; NaN where the widths differ."""
        drift = torch.full((self.num_concepts,), float("nan"))
        for first, last in self.span.unique(dim=0).tolist():
            a, b = (self.directions[self.sources.keys[end]] for end in (first, last))
            if a.shape != b.shape:
                continue
            of_span = (self.span == torch.tensor([first, last])).all(1)
            drift[of_span] = _degrees(a[of_span], b[of_span])
        return drift

    def table(self) -> pa.Table:
        """One row per concept."""
        return pa.table(
            {
                "concept": pa.array(range(self.num_concepts), pa.int32()),
                "group": pa.array(self.groups),
                "kind": pa.array(self.kinds),
                "frequency": pa.array(self.frequencies.tolist(), pa.float32()),
                "mean_magnitude": pa.array(self.mean_magnitudes.tolist(), pa.float32()),
                "parent": pa.array(self.parents, pa.int32()),
                "first_source": pa.array([self.sources.keys[i] for i in self.span[:, 0].tolist()]),
                "last_source": pa.array([self.sources.keys[i] for i in self.span[:, 1].tolist()]),
                "drift": pa.array(self.drift.tolist(), pa.float32()),
            }
        )

    def _column(self, source: str) -> int:
        return self.sources.index(self.sources.resolve(source).key)


def plant(config: WorldConfig, *, seed: int) -> Truth:
    """The truth that a description and a seed give."""
    sources = config.source_set
    presence = _presence(config, seed)
    strengths = _strengths(config)
    directions: dict[str, Tensor] = {}
    d = _unit_rows(config, seed, name="directions", width=config.sources[0].width)
    for column, key in enumerate(sources.keys):
        d = _seen(d, config, column, seed=seed)
        factor = presence[:, column] * strengths[:, column]
        directions[key] = torch.from_numpy((d * factor[:, None]).astype(np.float32))
    frequencies = _frequencies(config, seed)
    _check_firing(config, frequencies)
    return Truth(
        sources=sources,
        directions=directions,
        presence=torch.from_numpy(presence),
        frequencies=torch.from_numpy(frequencies.astype(np.float32)),
        mean_magnitudes=torch.tensor([_mean(g) for g in config.concepts for _ in range(g.num_concepts)]),
        groups=tuple(g.name for g in config.concepts for _ in range(g.num_concepts)),
        parents=_parents(config),
    )


def generator(seed: int, name: str, *, block: int = 0) -> np.random.Generator:
    """Random numbers of (seed, name, block): the same whatever was drawn before."""
    key = np.array([seed % 2**64, xxhash.xxh3_64_intdigest(f"world/{name}".encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, block], dtype=np.uint64)))


def loadings(correlation: Correlation, num_concepts: int, *, seed: int) -> Float[np.ndarray, "concepts rank"]:
    """`L`: how much each common cause moves each concept."""
    drawn = generator(seed, "loadings").standard_normal((num_concepts, correlation.rank), dtype=np.float32)
    return drawn * np.float32(correlation.scale / np.sqrt(correlation.rank))


def _seen(
    d: Float[np.ndarray, "concepts before"], config: WorldConfig, column: int, *, seed: int
) -> Float[np.ndarray, "concepts width"]:
    source, rng = config.sources[column], generator(seed, f"view/{column}")
    match source.view:
        case Same():
            return d
        case Turned(degrees=degrees):
            return _turned(d, np.deg2rad(degrees), rng)
        case Rotation():
            return d @ _orthogonal(source.width, rng).T
        case LinearMap(variance=variance, tau=tau):
            mapped = d @ rng.normal(0, np.sqrt(variance), (source.width, d.shape[1])).T
            mapped += rng.normal(0, tau, source.width) if tau else 0
            return mapped * np.median(_norms(d)) / np.median(_norms(mapped))
        case Independent():
            return _unit_rows(config, seed, name=f"directions/{column}", width=source.width)


def _turned(d: np.ndarray, angle: float, rng: np.random.Generator) -> np.ndarray:
    length = _norms(d)[:, None]
    unit = d / length
    other = rng.standard_normal(d.shape)
    other -= (other * unit).sum(1, keepdims=True) * unit
    return length * (np.cos(angle) * unit + np.sin(angle) * other / _norms(other)[:, None])


def _orthogonal(width: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform over orthogonal matrices: QR of a Gaussian, signs by the diagonal of R (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((width, width)))
    return q * np.sign(np.diag(r))


def _unit_rows(config: WorldConfig, seed: int, *, name: str, width: int) -> np.ndarray:
    rng = generator(seed, name)
    if config.geometry == "gaussian":
        rows = rng.standard_normal((config.num_concepts, width))
        return rows / _norms(rows)[:, None]
    if config.num_concepts > width:
        raise ConfigError(
            f"{config.num_concepts} orthonormal directions do not fit into {width} columns.",
            hint='Widen the sources, or use geometry="gaussian".',
        )
    return _orthogonal(width, rng)[: config.num_concepts]


def _presence(config: WorldConfig, seed: int) -> Bool[np.ndarray, "concepts sources"]:
    keys = config.source_set.keys
    presence = np.zeros((config.num_concepts, len(keys)), dtype=bool)
    for group, (start, stop) in zip(config.concepts, config.ranges().values(), strict=True):
        homes = np.array([keys.index(key) for key in config.homes(group)])
        presence[start:stop, homes] = True
        if group.min_span is not None:
            presence[start:stop, homes] = _stretches(group, len(homes), generator(seed, f"span/{group.name}"))
    return presence


def _stretches(group: ConceptGroup, num_sources: int, rng: np.random.Generator) -> Bool[np.ndarray, "concepts sources"]:
    """A length at random, then a place at random."""
    length = rng.integers(group.min_span or 1, num_sources + 1, group.num_concepts)
    first = rng.integers(0, num_sources - length + 1)
    places = np.arange(num_sources)
    return (places >= first[:, None]) & (places < (first + length)[:, None])


def _strengths(config: WorldConfig) -> Float[np.ndarray, "concepts sources"]:
    keys = config.source_set.keys
    strengths = np.ones((config.num_concepts, len(keys)))
    for group, (start, stop) in zip(config.concepts, config.ranges().values(), strict=True):
        if group.strengths is not None:
            strengths[start:stop, [keys.index(key) for key in config.homes(group)]] = group.strengths
    return strengths


def _frequencies(config: WorldConfig, seed: int) -> Float[np.ndarray, "concepts"]:
    ranks = generator(seed, "ranks").permutation(config.num_concepts)
    parts = [
        _frequency(group, ranks[start:stop], generator(seed, f"frequency/{group.name}"))
        for group, (start, stop) in zip(config.concepts, config.ranges().values(), strict=True)
    ]
    return np.concatenate(parts)


def _frequency(group: ConceptGroup, ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    match group.frequency:
        case Constant(value=value):
            return np.full(group.num_concepts, value)
        case LogUniform(low=low, high=high):
            return np.exp(rng.uniform(np.log(low), np.log(high), group.num_concepts))
        case Decaying(mean=mean, rate=rate, floor=floor):
            falling = np.exp(-rate * ranks)
            return np.maximum(floor, falling * mean / falling.mean())


def _parents(config: WorldConfig) -> tuple[int | None, ...]:
    """Concept number j of a group has parent number j modulo the parents' number."""
    found: list[int | None] = []
    for group in config.concepts:
        start, stop = config.ranges()[group.parents] if group.parents else (0, 0)
        found += [start + j % (stop - start) if group.parents else None for j in range(group.num_concepts)]
    return tuple(found)


def _check_firing(config: WorldConfig, frequencies: np.ndarray) -> None:
    most = 0.5 if config.correlation else 1.0
    for child, parent in enumerate(_parents(config)):
        above = most if parent is None else frequencies[parent]
        if frequencies[child] > above:
            raise ConfigError(
                f"concept {child} fires on a fraction {frequencies[child]:.3g} of rows; {above:.3g} is the most "
                + ("that it can." if parent is None else f"that its parent {parent} leaves it."),
                hint="Lower the frequency; with a correlation 0.5 is the highest.",
            )


def _mean(group: ConceptGroup) -> float:
    match group.magnitude:
        case Constant(value=value):
            return value
        case Uniform(low=low, high=high):
            return (low + high) / 2
        case Exponential(mean=mean):
            return mean


def _kind(lives: list[bool], keys: tuple[str, ...]) -> str:
    if all(lives):
        return "shared"
    return f"exclusive to {keys[lives.index(True)]}" if sum(lives) == 1 else "partial"


def _degrees(a: Tensor, b: Tensor) -> Tensor:
    return torch.rad2deg(cosine_similarity(a.double(), b.double(), dim=1).clamp(-1, 1).arccos()).float()


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=1)
