"""How well a crosscoder reconstructs rows it did not train on, in one pass with fp64 sums.

With `x̃` in normalised space, `e = x̃ − x̂̃` and `m` the mean of the rows seen here, over the written sources:

    fve                  1 − Σ_t Σ_s ‖e_t^s‖² / Σ_t Σ_s ‖x̃_t^s − m^s‖²        (ratio of sums; Minder et al. 2025)
    fve_mean_of_ratios   mean over t of 1 − Σ_s ‖e_t^s‖² / Σ_s ‖x̃_t^s‖²       (Kissane et al. 2024)

The second needs a centre before the pass: it is the normaliser's mean, zero in normalised space. Rows without variance
there are left out of it. `dead` counts latents that never fired on the rows seen; rows that a stream drops never come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.activations import Batch
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.groups import Columns


@contextmanager
def evaluating(crosscoder: Crosscoder) -> Iterator[None]:
    """Eval mode inside the block, and the mode found after it."""
    was_training = crosscoder.training
    crosscoder.eval()
    try:
        yield
    finally:
        crosscoder.train(was_training)


@dataclass(frozen=True)
class Reconstruction:
    """Rows at the written sources in normalised space, their code, what it gives back, and the error that is left.

    All are packed over `crosscoder.writes`, whether or not the normaliser is folded into the weights.
    """

    x: Float[Tensor, "rows writes"]
    code: SparseCode
    reconstruction: Float[Tensor, "rows writes"]
    error: Float[Tensor, "rows writes"]


class Reconstructor:
    """Encodes and decodes raw rows packed over `crosscoder.sources`, once for all who look at them."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        self._reads = Columns(crosscoder.sources, crosscoder.reads.keys)
        self._writes = Columns(crosscoder.sources, crosscoder.writes.keys)
        self._scale = crosscoder.scale_columns(crosscoder.sources)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "rows width"]) -> Reconstruction:
        """The reconstruction of raw rows."""
        cc = self.crosscoder
        raw = x.to(cc.mean)
        normalised = (raw - cc.mean) * self._scale
        reads = self._reads(raw if cc.folded_normaliser else normalised)
        code = cc.encode_normalised(reads)
        found = cc.decode_normalised(code, reads)
        if cc.folded_normaliser:
            found = (found - self._writes(cc.mean)) * self._writes(self._scale)
        target = self._writes(normalised)
        return Reconstruction(target, code, found, target - found)


class ReconstructionStatistics:
    """Running sums over rows; the properties may be read at any time."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        device = crosscoder.mean.device
        num_sources = len(crosscoder.writes)
        self.num_rows = 0
        self._error = torch.zeros(num_sources, dtype=torch.float64, device=device)
        self._square = torch.zeros(num_sources, dtype=torch.float64, device=device)
        self._sum = torch.zeros(crosscoder.writes.width, dtype=torch.float64, device=device)
        self._ratio = torch.zeros(2, dtype=torch.float64, device=device)  # sum of ratios, rows that have one
        self._fired = torch.zeros(crosscoder.num_latents, dtype=torch.int64, device=device)
        self._reconstructor = Reconstructor(crosscoder)

    def update(self, x: Float[Tensor, "rows width"]) -> Reconstruction:
        """Encode and decode raw rows packed over `crosscoder.sources`, add them to the sums, give what came of it."""
        found = self._reconstructor(x)
        self.add(found.x, error=found.error, code=found.code)
        return found

    @torch.no_grad()
    def add(self, x: Float[Tensor, "rows writes"], *, error: Float[Tensor, "rows writes"], code: SparseCode) -> None:
        """Add rows whose normalised writes `x`, error `x̃ − x̂̃` and code are at hand."""
        square, err = self._row_squares(x), self._row_squares(error)
        self._error += err.sum(0)
        self._square += square.sum(0)
        self._sum += x.sum(0, dtype=torch.float64)
        counted = square.sum(1) > 0
        ratios = err.sum(1)[counted] / square.sum(1)[counted]
        self._ratio += torch.stack([(1 - ratios).sum(), counted.sum()])
        self._fired += torch.bincount(code.latents, minlength=self.crosscoder.num_latents)
        self.num_rows += x.shape[0]

    @property
    def fve(self) -> float:
        """Fraction of variance explained, over all written sources."""
        return float(1 - self._error.sum() / self._variance.sum())

    @property
    def fve_mean_of_ratios(self) -> float:
        """The mean over rows of each row's own fraction explained."""
        return float(self._ratio[0] / self._ratio[1])

    @property
    def fve_per_source(self) -> dict[str, float]:
        """`fve` of every written source on its own."""
        return dict(zip(self.crosscoder.writes.keys, (1 - self._error / self._variance).tolist(), strict=True))

    @property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        return float(self._fired.sum()) / max(1, self.num_rows)

    @property
    def dead_fraction(self) -> float:
        """Fraction of latents that fired on no row."""
        return float((self._fired == 0).double().mean())

    @property
    def density(self) -> Float[Tensor, "latents"]:
        """Fraction of rows on which each latent fired."""
        return self._fired.double() / max(1, self.num_rows)

    @property
    def _variance(self) -> Float[Tensor, "sources"]:
        """`Σ_t ‖x̃_t^s − m^s‖²`; the rows are near their centre, so that the difference loses nothing."""
        means = self._sum.split(list(self.crosscoder.writes.widths))
        return self._square - torch.stack([part.square().sum() for part in means]) / max(1, self.num_rows)

    def _row_squares(self, x: Float[Tensor, "rows writes"]) -> Float[Tensor, "rows sources"]:
        parts = x.split(list(self.crosscoder.writes.widths), dim=1)
        return torch.stack([part.square().sum(1, dtype=torch.float64) for part in parts], dim=1)


def validate(crosscoder: Crosscoder, batches: Iterable[Batch]) -> dict[str, float]:
    """FVE, L0 and dead latents on `batches` in eval mode; the mode found is restored."""
    statistics = ReconstructionStatistics(crosscoder)
    with evaluating(crosscoder):
        for batch in batches:
            statistics.update(batch.x)
    return {
        "fve": statistics.fve,
        "fve_mean_of_ratios": statistics.fve_mean_of_ratios,
        "l0": statistics.l0,
        "dead_fraction": statistics.dead_fraction,
        **{f"fve/{key}": value for key, value in statistics.fve_per_source.items()},
    }
