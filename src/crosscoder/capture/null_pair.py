"""Null pairs: sources of which one is made up from another, so that they differ by nothing that has a meaning.

The structureless partner has a difference of the right mean, size and shape, and no more:

    x_b := x_a + m + L z,    m = E[x_b − x_a],    L Lᵀ = Cov(x_b − x_a) + ridge,    z ~ N(0, 1) anew for every row

The identical partner is a copy, `x_b := x_a`. A crosscoder trained on either shows what training alone makes of two
sources that hold the same. Noise is drawn on the CPU in blocks from (seed, number of the row), so that rows are the
same whatever the batch size and device, and after resuming.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from xxhash import xxh3_64_intdigest

from crosscoder.activations import ActivationSource, Batch, State
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.files import read_tensors, write_tensors
from crosscoder.sources import SourceSet

RIDGE = 1e-6
"""Of the mean variance, added to every variance: keeps the Cholesky factor of a degenerate difference finite."""
NUM_ROWS = 100_000
"""Rows that a difference is measured on, unless said otherwise."""
_THING = "difference"
_BLOCK = 1024


@dataclass(frozen=True)
class Difference:
    """Mean and covariance of `x_b − x_a` over `num_rows` rows."""

    mean: Float[Tensor, "width"]
    covariance: Float[Tensor, "width width"]
    num_rows: int

    @property
    def factor(self) -> Float[Tensor, "width width"]:
        """`L` with `L Lᵀ` the covariance and a tiny ridge."""
        ridge = RIDGE * self.covariance.diagonal().mean().clamp(min=1e-30)
        return torch.linalg.cholesky(self.covariance + ridge * torch.eye(len(self.mean), dtype=self.covariance.dtype))

    def save(self, path: Path) -> None:
        """Write it to one file."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "num_rows": torch.tensor(self.num_rows)}
        write_tensors(path, tensors, thing=_THING)

    @classmethod
    def load(cls, path: Path) -> Difference:
        """What `save` wrote."""
        tensors = read_tensors(path, thing=_THING)
        return cls(tensors["mean"], tensors["covariance"], int(tensors["num_rows"]))


def fit_difference(differences: Iterable[Float[Tensor, "_ width"]]) -> Difference:
    """Mean and covariance of rows that come in batches: one pass, fp64, about a running mean."""
    count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for batch in differences:
        rows = batch.double().cpu()
        own = rows.mean(0)
        centred = rows - own
        total = count + len(rows)
        shift = own - mean
        scatter = scatter + centred.T @ centred + torch.outer(shift, shift) * (count * len(rows) / total)
        mean, count = mean + shift * (len(rows) / total), total
    if count < 2:
        raise TextError(f"expected at least two rows to measure a difference on; got {count}.")
    return Difference(mean, scatter / count, count)


def measure_difference(source: ActivationSource, *, a: str, b: str, num_rows: int = NUM_ROWS) -> Difference:
    """The moments of `x_b − x_a` on the first rows of `source.contexts()`, whole batches up to `num_rows` or more."""
    key_a, key_b = pair_of(source.sources, a=a, b=b)
    columns_a, columns_b = (source.sources.slices[key] for key in (key_a, key_b))
    return fit_difference(
        _first((batch.x[:, columns_b] - batch.x[:, columns_a] for batch in source.contexts()), num_rows)
    )


class NullPair:
    """An ActivationSource in which `b` is `a` with a made-up difference without structure; other sources are kept.

    The true difference is measured on the first `num_rows` rows of `source.contexts()`, unless it is given.
    """

    def __init__(
        self,
        source: ActivationSource,
        *,
        a: str,
        b: str,
        difference: Difference | None = None,
        num_rows: int = NUM_ROWS,
        seed: int = 0,
    ) -> None:
        self._a, self._b = pair_of(source.sources, a=a, b=b)
        self.sources = source.sources
        self.seed = seed
        self._source, self._rows_served = source, 0
        self.difference = difference or measure_difference(source, a=a, b=b, num_rows=num_rows)
        self._factor = self.difference.factor.float()
        self._mean = self.difference.mean.float()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The source's batches with `b` made up."""
        for batch in self._source.batches(batch_size):
            x = self.null_rows(batch.x, first_row=self._rows_served)
            self._rows_served += len(x)
            yield Batch(x, batch.rows)

    def contexts(self) -> Iterator[Batch]:
        """The source's contexts with `b` made up, from other noise than the batches and the same every time."""
        first = 0
        for batch in self._source.contexts():
            yield Batch(self.null_rows(batch.x, first_row=first, stream="contexts"), batch.rows)
            first += len(batch.x)

    def state_dict(self) -> State:
        """The source's place, and how many rows have had their noise."""
        return {"source": self._source.state_dict(), "rows_served": self._rows_served, "seed": self.seed}

    def load_state_dict(self, state: State) -> None:
        """Go to a place that `state_dict` gave."""
        self._source.load_state_dict(state["source"])
        self._rows_served, self.seed = state["rows_served"], state["seed"]

    def null_rows(
        self, x: Float[Tensor, "rows width"], *, first_row: int, stream: str = "batches"
    ) -> Float[Tensor, "rows width"]:
        """Rows of the source with `b` made up; `first_row` numbers the first of them."""
        x_a = x[:, self.sources.slices[self._a]]
        noise = self._noise(first_row, len(x), stream).to(x)
        return _with(x, self.sources, self._b, x_a + self._mean.to(x) + noise @ self._factor.T.to(x))

    def _noise(self, first_row: int, num_rows: int, stream: str) -> Float[Tensor, "rows width"]:
        blocks = range(first_row // _BLOCK, (first_row + max(1, num_rows) - 1) // _BLOCK + 1)
        drawn = torch.cat([_block_of_noise(f"{self.seed}/{stream}/{n}", len(self._mean)) for n in blocks])
        start = first_row - blocks.start * _BLOCK
        return drawn[start : start + num_rows]


class IdenticalPair:
    """An ActivationSource in which `b` is a copy of `a`; other sources are kept."""

    def __init__(self, source: ActivationSource, *, a: str, b: str) -> None:
        self._a, self._b = pair_of(source.sources, a=a, b=b)
        self.sources = source.sources
        self._source = source

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The source's batches with `b` copied."""
        return map(self._copied, self._source.batches(batch_size))

    def contexts(self) -> Iterator[Batch]:
        """The source's contexts with `b` copied."""
        return map(self._copied, self._source.contexts())

    def state_dict(self) -> State:
        """The place in the source."""
        return self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go to a place in the source."""
        self._source.load_state_dict(state)

    def _copied(self, batch: Batch) -> Batch:
        return Batch(_with(batch.x, self.sources, self._b, batch.x[:, self.sources.slices[self._a]]), batch.rows)


def pair_of(sources: SourceSet, *, a: str, b: str) -> tuple[str, str]:
    """The keys of two different sources of one width; raises SourceMismatch or UnknownSource for others."""
    source_a, source_b = sources.resolve(a), sources.resolve(b)
    if source_a.key == source_b.key or source_a.width != source_b.width:
        raise SourceMismatch(
            "a null pair needs two sources of one width.",
            details=[f"a  {source_a.key}", f"b  {source_b.key}", *sources.describe()],
            hint="Name two sources whose models are equally wide.",
        )
    return source_a.key, source_b.key


def _with(x: Tensor, sources: SourceSet, key: str, columns: Tensor) -> Tensor:
    """Packed rows with the columns of one source exchanged."""
    changed = x.clone()
    changed[:, sources.slices[key]] = columns
    return changed


def _first(batches: Iterator[Tensor], num_rows: int) -> Iterator[Tensor]:
    """Batches until `num_rows` rows have come."""
    counted = accumulate(batches, lambda seen, batch: (seen[0] + len(seen[1]), batch), initial=(0, torch.empty(0)))
    return (batch for _, batch in takewhile(lambda seen: seen[0] < num_rows, counted) if len(batch))


def _block_of_noise(name: str, width: int) -> Float[Tensor, "block width"]:
    generator = torch.Generator().manual_seed(xxh3_64_intdigest(f"null/{name}".encode()) >> 1)
    return torch.randn(_BLOCK, width, generator=generator)
