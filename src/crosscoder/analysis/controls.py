"""A null pair: what a crosscoder says of two sources that differ by nothing that has structure.

The second source is made up from the first, with a difference of the right mean, size and shape but without meaning:

    x_b := x_a + m + L z,    m = E[x_b − x_a],    L Lᵀ = Cov(x_b − x_a) + ridge,    z ~ N(0, 1) anew for every row

A crosscoder trained on it shows which relative norms come out of training alone. The band that holds nearly all of
them is what counts of the real pair are to be compared with. Noise is drawn in blocks from (seed, number of the row),
so that rows are the same whatever the batch size, and after resuming.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from xxhash import xxh3_64_intdigest

from crosscoder.activations import ActivationSource, Batch, State
from crosscoder.errors import SourceMismatch, TextError

RIDGE = 1e-6
"""Of the mean variance, added to every variance: keeps the Cholesky factor of a degenerate difference finite."""
_BLOCK = 1024
NUM_DRAWS = 2000
INTERVAL = (0.025, 0.975)


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


class NullPair:
    """An ActivationSource of `a` as it is and a made-up `b`: a difference of the same size without structure.

    The true difference is measured on the first `num_rows` rows of `source.contexts()`, unless it is given.
    """

    def __init__(
        self,
        source: ActivationSource,
        *,
        a: str,
        b: str,
        difference: Difference | None = None,
        num_rows: int = 100_000,
        seed: int = 0,
    ) -> None:
        of = source.sources
        key_a, key_b = of.resolve(a).key, of.resolve(b).key
        if key_a == key_b or of[key_a].width != of[key_b].width:
            raise SourceMismatch(
                "a null pair needs two sources of one width.", details=[f"a  {key_a}", f"b  {key_b}", *of.describe()]
            )
        self.sources = of.subset([key_a, key_b])
        self.seed = seed
        self._source, self._rows_served = source, 0
        self._a, self._b = key_a, key_b
        self.difference = difference or fit_difference(_first(self._differences(), num_rows))
        self._factor = self.difference.factor.float()
        self._mean = self.difference.mean.float()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The source's batches with `b` made up."""
        for batch in self._source.batches(batch_size):
            x = self.null_rows(batch.x, first_row=self._rows_served)
            self._rows_served += len(x)
            yield Batch(x, batch.rows)

    def contexts(self) -> Iterator[Batch]:
        """The source's contexts with `b` made up, from other noise than the batches."""
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
        self, x: Float[Tensor, "rows all"], *, first_row: int, stream: str = "batches"
    ) -> Float[Tensor, "rows pair"]:
        """Rows of the source as rows of the null pair; `first_row` numbers the first of them."""
        of = self._source.sources
        x_a = x[:, of.slices[self._a]]
        noise = self._noise(first_row, len(x), stream).to(x)
        x_b = x_a + self._mean.to(x) + noise @ self._factor.T.to(x)
        return self.sources.pack({self._a: x_a, self._b: x_b})

    def _noise(self, first_row: int, num_rows: int, stream: str) -> Float[Tensor, "rows width"]:
        blocks = range(first_row // _BLOCK, (first_row + max(1, num_rows) - 1) // _BLOCK + 1)
        drawn = torch.cat([_block_of_noise(f"{self.seed}/{stream}/{n}", len(self._mean)) for n in blocks])
        start = first_row - blocks.start * _BLOCK
        return drawn[start : start + num_rows]

    def _differences(self) -> Iterator[Tensor]:
        columns = self._source.sources.slices
        return (batch.x[:, columns[self._b]] - batch.x[:, columns[self._a]] for batch in self._source.contexts())


@dataclass(frozen=True)
class Band:
    """The relative norms between two quantiles of null latents."""

    low: float
    high: float
    num_latents: int


@dataclass(frozen=True)
class Count:
    """A number of latents per crosscoder, mean over seeds, with an interval by resampling seeds and latents."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CountsBeyond:
    """Latents below and above a null's band; `expected` on each side were there no difference."""

    below: Count
    above: Count
    expected: float


def null_band(relative_norms: Sequence[Float[Tensor, "_"]], low: float = 0.001, high: float = 0.999) -> Band:
    """The band between quantiles of the relative norms of null crosscoders, pooled over seeds; NaN is left out."""
    pooled = np.concatenate([_finite(norms) for norms in relative_norms])
    if not len(pooled):
        raise TextError("expected relative norms of at least one live latent; got none.")
    bounds = np.quantile(pooled, [low, high])
    return Band(float(bounds[0]), float(bounds[1]), len(pooled))


def counts_beyond(
    band: Band, relative_norms: Sequence[Float[Tensor, "_"]], *, quantile: float = 0.001, seed: int = 0
) -> CountsBeyond:
    """How many latents lie below and above the band, one tensor of relative norms per seed; NaN is left out.

    The interval resamples seeds, and latents within each seed. `quantile` is what the band leaves out on each side.
    """
    finite = [_finite(norms) for norms in relative_norms]
    generator = np.random.Generator(np.random.Philox(seed))
    below = np.array([(norms < band.low).sum() for norms in finite])
    above = np.array([(norms > band.high).sum() for norms in finite])
    sizes = np.array([len(norms) for norms in finite])
    return CountsBeyond(
        below=_count(below, sizes, generator),
        above=_count(above, sizes, generator),
        expected=quantile * float(sizes.mean()),
    )


def _count(found: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> Count:
    """Resampling n latents of which c lie beyond gives Binomial(n, c / n) of them."""
    seeds = generator.integers(0, len(found), (NUM_DRAWS, len(found)))
    drawn = generator.binomial(sizes[seeds], (found / np.maximum(1, sizes))[seeds]).mean(1)
    low, high = np.quantile(drawn, INTERVAL)
    return Count(float(found.mean()), float(low), float(high))


def _finite(norms: Float[Tensor, "latents"]) -> np.ndarray:
    values = norms.detach().double().cpu().numpy()
    return values[np.isfinite(values)]


def _first(batches: Iterator[Tensor], num_rows: int) -> Iterator[Tensor]:
    """Batches until `num_rows` rows have come."""
    counted = accumulate(batches, lambda seen, batch: (seen[0] + len(seen[1]), batch), initial=(0, torch.empty(0)))
    return (batch for _, batch in takewhile(lambda seen: seen[0] < num_rows, counted) if len(batch))


def _block_of_noise(name: str, width: int) -> Float[Tensor, "block width"]:
    generator = torch.Generator().manual_seed(xxh3_64_intdigest(f"null/{name}".encode()) >> 1)
    return torch.randn(_BLOCK, width, generator=generator)
