"""ConceptWorld: activations whose truth is known, as a stream like any other.

    x_s = Σ_c v_c d_c^s + σ z_s

Rows are a pure function of (seed, stream, number of the row): they are drawn in blocks of 1,024 from Philox, a
counter-based generator keyed by the seed and the stream's name, so that they do not depend on the batch size and a
resumed stream goes on exactly. Training rows and contexts are two streams.

Firing: a concept without parent fires with its frequency, or `2 p · sigmoid(L u + e)` where concepts are correlated; a
child fires, on rows where its parent does, with probability `p_child / p_parent`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoder.activations import Batch, Rows, State
from crosscoder.errors import ConfigError
from crosscoder.sources import SourceSet
from crosscoder.synthetic.description import ConceptGroup, Constant, Exponential, Uniform, WorldConfig
from crosscoder.synthetic.truth import Truth, generator, loadings, plant

BLOCK = 1024
"""Rows that are drawn together."""
CONTEXTS_AT_ONCE = 16

Stream = Literal["batches", "contexts"]


@dataclass(frozen=True)
class Drawn:
    """Rows with what made them: packed activations, and the value of every concept."""

    x: Float[Tensor, "rows width"]
    values: Float[Tensor, "rows concepts"]


class ConceptWorld:
    """An endless ActivationSource of rows with planted concepts; `truth` says which.

    >>> from crosscoder.synthetic import feb25_toy
    >>> world = ConceptWorld(feb25_toy("tight", width=16), seed=0)
    >>> next(world.batches(4)).x.shape, world.truth.num_concepts
    (torch.Size([4, 32]), 700)
    """

    def __init__(
        self, config: WorldConfig, *, seed: int = 0, num_contexts: int = 64, context_length: int = 256
    ) -> None:
        self.config, self.seed = config, seed
        self.num_contexts, self.context_length = num_contexts, context_length
        self.truth: Truth = plant(config, seed=seed)
        self._directions = self.truth.packed
        self._chances = _chances(self.truth).astype(np.float32)
        self._parents = np.array([-1 if parent is None else parent for parent in self.truth.parents])
        self._rows_served = 0
        self._last: tuple[tuple[Stream, int], Drawn] | None = None

    @property
    def sources(self) -> SourceSet:
        """The sources, in the order in which rows pack them."""
        return self.truth.sources

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Rows for training, without end."""
        while True:
            first = self._rows_served
            self._rows_served += batch_size
            yield Batch(self.draw(first, batch_size).x)

    def contexts(self) -> Iterator[Batch]:
        """`num_contexts` contexts of rows that training never sees, some at a time."""
        length = self.context_length
        for first in range(0, self.num_contexts, CONTEXTS_AT_ONCE):
            contexts = torch.arange(first, min(self.num_contexts, first + CONTEXTS_AT_ONCE))
            rows = Rows(
                context=contexts.repeat_interleave(length),
                position=torch.arange(length).repeat(len(contexts)),
                role=torch.zeros(len(contexts) * length, dtype=torch.int8),
            )
            yield Batch(self.draw(first * length, len(rows.context), stream="contexts").x, rows)

    def state_dict(self) -> State:
        """The world, and how many rows it has given."""
        return {"rows_served": self._rows_served, "seed": self.seed, "world": self.config.model_dump(mode="json")}

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` of the same world gave."""
        if state["seed"] != self.seed or WorldConfig.model_validate(state["world"]) != self.config:
            raise ConfigError(
                "the place to resume at is in another world.",
                details=[f"this seed {self.seed}", f"that seed {state['seed']}"],
                hint="Build the world with the description and the seed that the state names.",
            )
        self._rows_served = state["rows_served"]

    def draw(self, first_row: int, num_rows: int, *, stream: Stream = "batches") -> Drawn:
        """Any stretch of a stream, with the concepts' values."""
        blocks = range(first_row // BLOCK, (first_row + max(1, num_rows) - 1) // BLOCK + 1)
        drawn = [self._block(stream, number) for number in blocks]
        start = first_row - blocks.start * BLOCK
        here = slice(start, start + num_rows)
        if len(drawn) == 1:
            return Drawn(drawn[0].x[here], drawn[0].values[here])
        return Drawn(torch.cat([d.x for d in drawn])[here], torch.cat([d.values for d in drawn])[here])

    def _block(self, stream: Stream, number: int) -> Drawn:
        if self._last is not None and self._last[0] == (stream, number):
            return self._last[1]
        rng = generator(self.seed, f"rows/{stream}", block=number)
        values = torch.from_numpy(self._values(self._firing(rng), rng))
        x = values @ self._directions
        if self.config.noise:
            x += self.config.noise * torch.from_numpy(self._noise(rng))
        block = Drawn(x, values)
        self._last = ((stream, number), block)
        return block

    def _firing(self, rng: np.random.Generator) -> Bool[np.ndarray, "block concepts"]:
        chances = self._chances
        if self.config.correlation is not None:
            chances = np.where(self._parents < 0, chances * self._common_causes(rng), chances)
        fires = rng.random((BLOCK, len(self._parents)), dtype=np.float32) < chances
        for group, (start, stop) in zip(self.config.concepts, self.config.ranges().values(), strict=True):
            if group.parents is not None:
                fires[:, start:stop] &= fires[:, self._parents[start:stop]]
        return fires

    def _common_causes(self, rng: np.random.Generator) -> Float[np.ndarray, "block concepts"]:
        """`2 sigmoid(L u + e)`, whose mean is 1."""
        correlation = self.config.correlation
        assert correlation is not None
        weights = loadings(correlation, len(self._parents), seed=self.seed)
        causes = rng.standard_normal((BLOCK, correlation.rank), dtype=np.float32)
        g = causes @ weights.T + rng.standard_normal((BLOCK, len(weights)), dtype=np.float32)
        return 2 / (1 + np.exp(-g))

    def _values(
        self, fires: Bool[np.ndarray, "block concepts"], rng: np.random.Generator
    ) -> Float[np.ndarray, "block concepts"]:
        values = np.zeros(fires.shape, dtype=np.float32)
        for group, (start, stop) in zip(self.config.concepts, self.config.ranges().values(), strict=True):
            own = fires[:, start:stop]
            values[:, start:stop][own] = _magnitudes(group, int(own.sum()), rng)
        return values

    def _noise(self, rng: np.random.Generator) -> Float[np.ndarray, "block width"]:
        if self.config.noise_across == "independent":
            return rng.standard_normal((BLOCK, self.sources.width), dtype=np.float32)
        one = rng.standard_normal((BLOCK, self.sources.widths[0]), dtype=np.float32)
        return np.tile(one, (1, len(self.sources)))


def _chances(truth: Truth) -> Float[np.ndarray, "concepts"]:
    """Probability to fire; for a child, where its parent fires."""
    p = truth.frequencies.double().numpy()
    above = np.array([1.0 if parent is None else p[parent] for parent in truth.parents])
    return p / above


def _magnitudes(group: ConceptGroup, number: int, rng: np.random.Generator) -> Float[np.ndarray, "number"]:
    match group.magnitude:
        case Constant(value=value):
            return np.full(number, value, dtype=np.float32)
        case Uniform(low=low, high=high):
            return low + (high - low) * rng.random(number, dtype=np.float32)
        case Exponential(mean=mean):
            return mean * rng.standard_exponential(number, dtype=np.float32)
