"""A behaviour, as a predicate of replies, and how often it shows.

With one reply a prompt, intervals are Wilson's at 95 %. Several replies of one prompt are not independent: then prompts
are drawn again with all their replies (bootstrap, percentiles). Where every reply is alike that says nothing; there the
interval is Wilson's of as many replies as there are prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from crosscoder.errors import ConfigError
from crosscoder.synthetic.curves import wilson

_DRAWS = 2000


@dataclass(frozen=True)
class Behaviour:
    """A name, and the test that says of a reply whether the behaviour shows in it."""

    name: str
    shows: Callable[[str], bool]


@dataclass(frozen=True)
class Rate:
    """How many of `total` replies show a behaviour, with the 95 % interval of the share, and how that was found."""

    hits: int
    total: int
    low: float
    high: float
    interval: str = "Wilson"

    @property
    def share(self) -> float:
        """The share that shows it; NaN of no replies."""
        return self.hits / self.total if self.total else float("nan")

    @classmethod
    def of(cls, shown: Iterable[bool]) -> Rate:
        """The rate of what was counted one by one."""
        found = list(shown)
        return cls(sum(found), len(found), *wilson(sum(found), len(found)))

    @classmethod
    def over_prompts(cls, shown: Iterable[bool], *, num_samples: int, seed: int = 0) -> Rate:
        """The rate over `num_samples` replies of each prompt, those of one prompt together."""
        found = list(shown)
        if num_samples == 1 or not found:
            return cls.of(found)
        shares = torch.tensor(found, dtype=torch.float64).view(-1, num_samples).mean(1)
        if sum(found) in (0, len(found)):
            low, high = wilson(len(shares) if all(found) else 0, len(shares))
            return cls(sum(found), len(found), low, high, f"Wilson of {len(shares)} prompts")
        generator = torch.Generator().manual_seed(seed)
        drawn = shares[torch.randint(len(shares), (_DRAWS, len(shares)), generator=generator)].mean(1)
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(sum(found), len(found), low, high, "bootstrap over prompts")


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
