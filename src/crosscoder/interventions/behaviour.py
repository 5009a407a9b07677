"""A behaviour, as a predicate of replies, and how often it shows.

Intervals are Wilson's at 95 %, and take replies as independent: several samples of one prompt are not quite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from crosscoder.errors import ConfigError
from crosscoder.synthetic.curves import wilson


@dataclass(frozen=True)
class Behaviour:
    """A name, and the test that says of a reply whether the behaviour shows in it."""

    name: str
    shows: Callable[[str], bool]


@dataclass(frozen=True)
class Rate:
    """How many of `total` replies show a behaviour, with the 95 % interval of the share."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share that shows it; NaN of no replies."""
        return self.hits / self.total if self.total else float("nan")

    @classmethod
    def of(cls, shown: Iterable[bool]) -> Rate:
        """The rate of what was counted one by one."""
        found = list(shown)
        return cls(sum(found), len(found), *wilson(sum(found), len(found)))


def contains(text: str) -> Behaviour:
    """A reply that has `text` in it, in that spelling."""
    if not text:
        raise ConfigError("expected some text to look for in replies; got none.")
    return Behaviour(f"contains {text!r}", lambda reply: text in reply)


def matches(pattern: str) -> Behaviour:
    """A reply in which a regular expression is found; `^` is its beginning."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"expected a regular expression; {pattern!r} is none: {error}.", hint="Write special signs as \\( or \\.."
        ) from error
    return Behaviour(f"matches {pattern!r}", lambda reply: compiled.search(reply) is not None)
