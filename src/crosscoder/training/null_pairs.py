"""A run on a null pair: `activations.null_pair` in a run file, which makes an ordinary run a control.

    activations: {null_pair: {kind: structureless, a: base, b: chat, seed: 1}}

Everything else of the run stays as it is. Sources are made up before differences of them are taken. The difference of
a structureless pair is measured once, on training text, and kept in the run directory, so that the run goes on and is
analysed with the very same one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from crosscoder.activations import ActivationSource
from crosscoder.capture.null_pair import NUM_ROWS, Difference, IdenticalPair, NullPair, measure_difference, pair_of
from crosscoder.sources import SourceSet
from crosscoder.training.settings import Count, Settings

_A = "The source that is kept: its key, or the alias of a model with one source."
_B = "The source that is made up in its place."


class StructurelessNull(Settings):
    """`x_b := x_a + N(mean, Cov(x_b − x_a))`: a difference of the same size and shape that means nothing."""

    kind: Literal["structureless"] = Field(
        default="structureless", description="b is a plus noise with the moments of the true difference."
    )
    a: str = Field(description=_A)
    b: str = Field(description=_B)
    seed: int = Field(default=0, ge=0, description="Seed of the noise.")
    num_rows: Count = Field(default=NUM_ROWS, description="Training rows that the true difference is measured on.")

    def in_words(self) -> str:
        """What the made-up source is."""
        return f"{self.b} := {self.a} + noise with the mean and covariance of {self.b} − {self.a}, seed {self.seed}"


class IdenticalNull(Settings):
    """`x_b := x_a`: a copy."""

    kind: Literal["identical"] = Field(default="identical", description="b is a copy of a.")
    a: str = Field(description=_A)
    b: str = Field(description=_B)

    def in_words(self) -> str:
        """What the made-up source is."""
        return f"{self.b} := {self.a}"


NullConfig = Annotated[StructurelessNull | IdenticalNull, Field(discriminator="kind")]


def check(null: NullConfig, sources: SourceSet) -> None:
    """Raises UnknownSource or SourceMismatch unless the pair is one of `sources.underlying`."""
    pair_of(sources.underlying, a=null.a, b=null.b)


def measured(null: NullConfig | None, source: ActivationSource) -> Difference | None:
    """The moments of the true difference, where the null pair needs them."""
    if not isinstance(null, StructurelessNull):
        return None
    return measure_difference(source, a=null.a, b=null.b, num_rows=null.num_rows)


def made_up(source: ActivationSource, null: NullConfig | None, difference: Difference | None) -> ActivationSource:
    """The source with `b` made up as `null` says; the same object without a null pair.

    A structureless pair without a `difference` has it measured on this source.
    """
    if null is None:
        return source
    if isinstance(null, IdenticalNull):
        return IdenticalPair(source, a=null.a, b=null.b)
    return NullPair(source, a=null.a, b=null.b, difference=difference, num_rows=null.num_rows, seed=null.seed)
