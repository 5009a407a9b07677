"""Fit the normaliser: `x̃_s = (x_s − μ_s) · c_s` with `c_s = sqrt(w̄ / E‖x_s − μ_s‖²)`, w̄ the mean width.

Every source then has the same energy w̄, whatever its width or scale, so that no source dominates the loss or the norms.
Means and variances in fp64, over training rows, one pass (Chan's pairwise update of counts, means and squares).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.errors import TextError
from crosscoder.sources import SourceSet


@dataclass(frozen=True)
class Normaliser:
    """`μ` (packed) and `c` (per source), and the rows that they come from."""

    mean: Float[Tensor, "width"]
    scale: Float[Tensor, "sources"]
    num_rows: int


def fit(sources: SourceSet, batches: Iterable[Float[Tensor, "_ width"]]) -> Normaliser:
    """The normaliser of packed raw rows; raises TextError for fewer than two rows or a source that never varies."""
    count, mean, squares = 0, torch.zeros(sources.width), torch.zeros(sources.width)
    for x in batches:
        rows = x.double()
        mean, squares = mean.to(rows), squares.to(rows)
        own = rows.mean(0)
        total = count + rows.shape[0]
        squares = squares + (rows - own).square().sum(0) + (own - mean).square() * (count * rows.shape[0] / total)
        mean = mean + (own - mean) * (rows.shape[0] / total)
        count = total
    variances = {key: part / max(1, count) for key, part in sources.unpack(squares[None]).items()}
    energy = torch.stack([part.sum() for part in variances.values()])
    if count < 2 or not bool((energy > 0).all()):
        raise TextError(
            f"cannot normalise: {count} rows, and the variance of each source is {energy.tolist()}.",
            hint="Give more text; a source whose activations never vary cannot be used.",
        )
    return Normaliser(mean.cpu(), (sources.width / len(sources) / energy).sqrt().cpu(), count)
