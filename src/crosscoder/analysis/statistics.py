"""What every latent does on the analysis set, whichever pair of sources is compared later.

density                  share of rows on which it is active; density_<role>: share of that role's rows
mean_value, max_value    of raw f, before any decoder norm, over the rows on which it is active
dead, dense              active on no row; active on more than `DENSE` of them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import ROLES, Batch
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder

DENSE = 0.1
"""Of the rows: a latent active on more is dense. It is where the frequency penalty of Gemma Scope 2 sets in."""


@dataclass(frozen=True)
class DensityFlags:
    """Which latents are dead, active on no row of the analysis set, and which are dense, on more than `cut` of them."""

    density: Float[Tensor, "latents"]
    cut: float
    dead: Bool[Tensor, "latents"]
    dense: Bool[Tensor, "latents"]

    @property
    def dense_latents(self) -> Int[Tensor, "some"]:
        """The dense latents, densest first."""
        order = self.density.argsort(descending=True, stable=True)
        return order[: int(self.dense.sum())]

    def table(self) -> pa.Table:
        """One row per latent."""
        return pa.table(
            {
                "latent": pa.array(range(len(self.density)), pa.int32()),
                "density": pa.array(self.density.float().cpu().numpy()),
                "dead": pa.array(self.dead.cpu().numpy()),
                "dense": pa.array(self.dense.cpu().numpy()),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """How many are dead and how many dense, and which share of all active pairs the dense ones have."""
        active = float(self.density.sum())
        return {
            "cut": self.cut,
            "num_latents": len(self.density),
            "num_dead": int(self.dead.sum()),
            "num_dense": int(self.dense.sum()),
            "share_of_active_pairs_dense": float(self.density[self.dense].sum()) / active if active else None,
        }


def density_flags(density: Float[Tensor, "latents"], *, cut: float = DENSE) -> DensityFlags:
    """Flags from the share of rows on which each latent is active."""
    return DensityFlags(density, cut, dead=density == 0, dense=density > cut)


class LatentStatistics:
    """Running counts, sums and maxima of every latent's values; an observer of a pass."""

    def __init__(self, num_latents: int) -> None:
        self.num_latents = num_latents
        self.num_rows = torch.zeros(len(ROLES), dtype=torch.int64)
        self._counts = torch.zeros(len(ROLES), num_latents, dtype=torch.int64)
        self._sum = torch.zeros(num_latents, dtype=torch.float64)
        self._max = torch.zeros(num_latents, dtype=torch.float64)

    @torch.no_grad()
    def update(self, batch: Batch, code: SparseCode) -> None:
        """Add the rows of one batch."""
        latents, values = code.latents.cpu(), code.values.double().cpu()
        role = torch.zeros(code.num_rows, dtype=torch.int64) if batch.rows is None else batch.rows.role.long().cpu()
        cell = role[code.row_ids.cpu()] * self.num_latents + latents
        self.num_rows += torch.bincount(role, minlength=len(ROLES))
        self._counts += torch.bincount(cell, minlength=self._counts.numel()).view_as(self._counts)
        self._sum.index_add_(0, latents, values)
        self._max.scatter_reduce_(0, latents, values, "amax")

    @property
    def density(self) -> Tensor:
        """Share of all rows on which each latent is active, (latents,)."""
        return self._counts.sum(0).double() / self.num_rows.sum().clamp(min=1)

    @property
    def num_active(self) -> Int[Tensor, "latents"]:
        """Rows on which each latent is active."""
        return self._counts.sum(0)

    @property
    def max_value(self) -> Float[Tensor, "latents"]:
        """The largest value of each latent; 0 where it was never active."""
        return self._max

    def table(self, crosscoder: Crosscoder) -> pa.Table:
        """One row per latent: densities, values, and decoder norms at every written source in both spaces.

        A norm is null where the latent cannot write.
        """
        counts = self._counts.sum(0)
        columns: dict[str, Tensor] = {
            "density": self.density,
            "mean_value": self._sum / counts.clamp(min=1),
            "max_value": self._max,
        }
        for name, rows, active in zip(ROLES, self.num_rows, self._counts, strict=True):
            columns[f"density_{name}"] = active.double() / rows.clamp(min=1)
        for space in ("normalised", "raw"):
            norms = crosscoder.decoder_norms(space).detach().cpu()
            columns |= {f"norm_{space}/{key}": norms[:, i] for i, key in enumerate(crosscoder.writes.keys)}
        writes = dict(zip(crosscoder.writes.keys, crosscoder.wiring.writes_mask.T, strict=True))
        arrays = {
            name: pa.array(column.float().numpy(), mask=None if "/" not in name else ~writes[name.split("/", 1)[1]])
            for name, column in columns.items()
        }
        flags = density_flags(self.density)
        latent, dead = pa.array(range(self.num_latents), pa.int32()), pa.array(flags.dead.numpy())
        first = {"latent": latent, "dead": dead, "num_active": pa.array(counts.numpy())}
        return pa.table(first | arrays | {"dense": pa.array(flags.dense.numpy())})
