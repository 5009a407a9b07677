"""What a world is: its sources, its groups of concepts, how they fire, and the noise. Plain data, saved as JSON.

A row of source s is `x_s = Σ_c v_c d_c^s + σ z`: concept c has the value `v_c ≥ 0` (0 where it does not fire), the same
at every source, and the direction `d_c^s`, zero where c does not live. A source's *view* says how directions come to it
from the source before it in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crosscoder.errors import ConfigError
from crosscoder.sources import Source, SourceSet


def _check_order(low: float, high: float) -> None:
    if low > high:
        raise ConfigError(f"expected low <= high; got low {low} and high {high}.")


class Described(BaseModel):
    """One part of a description: frozen, and closed to keys that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Constant(Described):
    """Always the same number."""

    kind: Literal["constant"] = Field(default="constant", description="always the same")
    value: float = Field(default=1.0, gt=0, description="the number")


class Uniform(Described):
    """Between `low` and `high`, all alike."""

    kind: Literal["uniform"] = Field(default="uniform", description="all numbers between two alike")
    low: float = Field(default=0.0, ge=0, description="lowest number")
    high: float = Field(default=1.0, gt=0, description="highest number")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.high)
        return self


class Exponential(Described):
    """Positive with a long tail."""

    kind: Literal["exponential"] = Field(default="exponential", description="positive with a long tail")
    mean: float = Field(default=1.0, gt=0, description="mean")


class LogUniform(Described):
    """Between `low` and `high`, every octave alike: drawn once for each concept."""

    kind: Literal["log_uniform"] = Field(default="log_uniform", description="every octave between two numbers alike")
    low: float = Field(gt=0, description="lowest number")
    high: float = Field(gt=0, description="highest number")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.high)
        return self


class Decaying(Described):
    """`p_c ∝ exp(−rate · π(c))` with π a random order of all concepts of the world, scaled to a mean."""

    kind: Literal["decaying"] = Field(default="decaying", description="falls exponentially with a random rank")
    mean: float = Field(gt=0, description="mean over the group before the floor")
    rate: float = Field(ge=0, description="fall of the logarithm from one rank to the next")
    floor: float = Field(default=1e-4, gt=0, description="no concept is rarer")


Magnitude = Annotated[Constant | Uniform | Exponential, Field(discriminator="kind")]
Frequency = Annotated[Constant | LogUniform | Decaying, Field(discriminator="kind")]


class Same(Described):
    """Directions as at the source before."""

    kind: Literal["same"] = Field(default="same", description="as at the source before")


class Turned(Described):
    """Each direction turned by an angle in a random plane of its own: `cos θ d + sin θ n`."""

    kind: Literal["turned"] = Field(default="turned", description="every direction turned in a plane of its own")
    degrees: float = Field(ge=0, le=180, description="the angle")


class Rotation(Described):
    """All directions turned together by one random orthogonal matrix: the geometry stays."""

    kind: Literal["rotation"] = Field(default="rotation", description="one random orthogonal matrix")


class LinearMap(Described):
    """`A d + b`, `A_ij ~ N(0, variance)`, `b ~ N(0, tau²)`, scaled to keep the median norm; any width."""

    kind: Literal["linear_map"] = Field(default="linear_map", description="one random affine map, the same for all")
    variance: float = Field(default=0.25, gt=0, description="variance of the matrix' entries")
    tau: float = Field(default=0.1, ge=0, description="standard deviation of the offset's entries")


class Independent(Described):
    """New random directions, unrelated to those of the source before; any width."""

    kind: Literal["independent"] = Field(default="independent", description="new random directions")


View = Annotated[Same | Turned | Rotation | LinearMap | Independent, Field(discriminator="kind")]


class WorldSource(Described):
    """One source of a world."""

    key: str = Field(description="model/site")
    width: int = Field(ge=1, description="number of columns")
    view: View = Field(default=Same(), description="how directions come here from the source before")


class ConceptGroup(Described):
    """Concepts of one kind.

    With `min_span`, each concept lives in a random stretch of neighbouring sources, of at least that many; without it,
    in all of `sources`.
    """

    name: str = Field(min_length=1, description="the group's name")
    num_concepts: int = Field(ge=1, description="how many")
    frequency: Frequency = Field(description="fraction of rows on which a concept fires, children included")
    magnitude: Magnitude = Field(default=Uniform(), description="value of a concept on a row where it fires")
    sources: tuple[str, ...] | None = Field(default=None, description="where they live; null: everywhere")
    strengths: tuple[float, ...] | None = Field(default=None, description="norm at each of these sources; null: 1")
    min_span: int | None = Field(default=None, ge=1, description="shortest stretch of sources; null: all of them")
    parents: str | None = Field(default=None, description="group without whose concepts these never fire")


class Correlation(Described):
    """Concepts fire together: `P(c fires) = 2 p_c · sigmoid(g_c)`, `g = L u + e`, `L_cj ~ N(0, (scale/√rank)²)`.

    `u` and `e` are standard normal anew for every row. As g is symmetric about 0, p_c is exactly the frequency of c;
    it may be 0.5 at most.
    """

    rank: int = Field(default=10, ge=1, description="number of common causes")
    scale: float = Field(default=0.5, ge=0, description="size of the common part beside each concept's own, which is 1")


class WorldConfig(Described):
    """A world. With the same description and seed, all rows are the same on every machine.

    >>> world = WorldConfig(
    ...     sources=(WorldSource(key="base/embed", width=8), WorldSource(key="chat/embed", width=8)),
    ...     concepts=(ConceptGroup(name="shared", num_concepts=4, frequency=Constant(value=0.1)),),
    ... )
    >>> world.num_concepts
    4
    """

    format: Literal["crosscoder.world/1"] = Field(default="crosscoder.world/1", description="what this file is")
    sources: tuple[WorldSource, ...] = Field(min_length=1, description="the sources, in order")
    concepts: tuple[ConceptGroup, ...] = Field(min_length=1, description="groups of concepts; parents come first")
    geometry: Literal["gaussian", "orthonormal"] = Field(
        default="gaussian", description="unit vectors at random, or orthonormal where they fit"
    )
    correlation: Correlation | None = Field(default=None, description="common causes; null: concepts are independent")
    noise: float = Field(default=0.01, ge=0, description="standard deviation of the noise in every column")
    noise_across: Literal["independent", "shared"] = Field(
        default="independent", description="whether the sources have noise of their own"
    )

    @property
    def num_concepts(self) -> int:
        """Concepts of all groups together."""
        return sum(group.num_concepts for group in self.concepts)

    @property
    def source_set(self) -> SourceSet:
        """The sources, as rows pack them."""
        return SourceSet(_source(source.key, source.width) for source in self.sources)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """First concept and the one past the last, for every group."""
        stops = [sum(g.num_concepts for g in self.concepts[: i + 1]) for i in range(len(self.concepts))]
        return {g.name: (stop - g.num_concepts, stop) for g, stop in zip(self.concepts, stops, strict=True)}

    def homes(self, group: ConceptGroup) -> tuple[str, ...]:
        """The sources where a group lives."""
        return self.source_set.keys if group.sources is None else tuple(self.source_set[k].key for k in group.sources)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        names = [group.name for group in self.concepts]
        if len(set(names)) < len(names):
            raise ConfigError("expected the groups of concepts to have different names.", details=names)
        for group in self.concepts:
            self._check_places(group)
        for place, group in enumerate(self.concepts):
            self._check_parents(group, names[:place])
        self._check_views()
        return self

    def _check_places(self, group: ConceptGroup) -> None:
        homes = self.homes(group)
        if group.strengths is not None and len(group.strengths) != len(homes):
            raise ConfigError(
                f"group {group.name!r} has {len(homes)} sources and {len(group.strengths)} strengths.",
                hint="Give one strength for each source.",
            )
        if group.min_span is not None and group.min_span > len(homes):
            raise ConfigError(f"group {group.name!r} lives in {len(homes)} sources; min_span is {group.min_span}.")

    def _check_parents(self, group: ConceptGroup, earlier: Sequence[str]) -> None:
        if group.parents is not None and group.parents not in earlier:
            raise ConfigError(
                f"the parents of group {group.name!r} are in {group.parents!r}, which is no group before it.",
                details=list(earlier),
                hint="Name a group that stands earlier in the list.",
            )

    def _check_views(self) -> None:
        if not isinstance(self.sources[0].view, Same):
            raise ConfigError("the first source has no source before it to be a view of.", hint="Leave its view out.")
        for before, source in zip(self.sources, self.sources[1:], strict=False):
            any_width = isinstance(source.view, LinearMap | Independent)
            if before.width != source.width and not any_width:
                raise ConfigError(
                    f"{source.key} ({source.width} wide) sees {before.key} ({before.width} wide) as "
                    f"{source.view.kind!r}, which needs equal widths.",
                    hint="Use linear_map or independent.",
                )
        if self.noise_across == "shared" and len({source.width for source in self.sources}) > 1:
            raise ConfigError("sources of different widths cannot share their noise.")


def _source(key: str, width: int) -> Source:
    return Source.parse(key, width=width)
