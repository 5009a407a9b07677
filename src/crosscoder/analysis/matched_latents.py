"""Matched latents: for every latent of a set another one, as often active and as strong, to be its control.

What an edit of some latents does is only known beside what an edit of *as many others of the same weight* does. With
`z_i = (log density_i, log norm_i)`, each in units of its standard deviation over the live latents, every chosen latent
c, in a random order, gets one of its `nearest` free neighbours by `‖z_i − z_c‖₂`, drawn uniformly. Without replacement;
chosen and excluded latents are never drawn. Seeds give different sets: use several, as one random set is one draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.errors import ConfigError

Z = Float[np.ndarray, "latents two"]


@dataclass(frozen=True)
class MatchedLatents:
    """`latents[n]` stands for `chosen[n]`; densities and norms of both are side by side, `distance` is between their z.

    `seed` and `nearest` say how they were drawn.
    """

    chosen: Int[Tensor, "pairs"]
    latents: Int[Tensor, "pairs"]
    density: Float[Tensor, "pairs 2"]
    norm: Float[Tensor, "pairs 2"]
    distance: Float[Tensor, "pairs"]
    seed: int
    nearest: int

    def table(self) -> pa.Table:
        """One row per pair."""
        return pa.table(
            {
                "chosen": pa.array(self.chosen.tolist(), pa.int32()),
                "latent": pa.array(self.latents.tolist(), pa.int32()),
                "density_chosen": pa.array(self.density[:, 0].tolist(), pa.float32()),
                "density": pa.array(self.density[:, 1].tolist(), pa.float32()),
                "norm_chosen": pa.array(self.norm[:, 0].tolist(), pa.float32()),
                "norm": pa.array(self.norm[:, 1].tolist(), pa.float32()),
                "distance": pa.array(self.distance.tolist(), pa.float32()),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """How the set was drawn and how well it matches: ratios of geometric means, 1 where they are equal."""
        ratios = {name: _geometric_ratio(part) for name, part in (("density", self.density), ("norm", self.norm))}
        worst = float(self.distance.max()) if len(self.distance) else None
        return {
            "num_latents": len(self.chosen),
            "seed": self.seed,
            "nearest": self.nearest,
            "ratio_of_geometric_means": ratios,
            "largest_distance": worst,
        }


def matched_latents(
    chosen: Int[Tensor, "some"] | Sequence[int],
    *,
    density: Float[Tensor, "latents"],
    norm: Float[Tensor, "latents"],
    exclude: Int[Tensor, "others"] | Sequence[int] = (),
    nearest: int = 5,
    seed: int = 0,
) -> MatchedLatents:
    """As many other latents as are chosen, matched in density and decoder norm.

    `norm` is one number per latent, such as the norm at the source that is edited. Raises ConfigError where a chosen
    latent is dead or does not exist, or where fewer free latents are left than were chosen.
    """
    wanted, out = _ids(chosen), _ids(exclude)
    live = ((density > 0) & (norm > 0)).cpu().numpy()
    _check(wanted, out, live)
    free = live.copy()
    free[np.concatenate([wanted, out])] = False
    if free.sum() < len(wanted):
        raise ConfigError(
            f"expected {len(wanted)} latents to choose controls from; {int(free.sum())} are live and free.",
            hint="Choose fewer latents, or exclude fewer.",
        )
    z = _standardised(density, norm, live)
    found, distance = _draw(z, wanted, free, nearest=nearest, seed=seed)
    both = torch.from_numpy(np.stack([wanted, found], axis=1))
    return MatchedLatents(
        chosen=both[:, 0],
        latents=both[:, 1],
        density=density.cpu()[both],
        norm=norm.cpu()[both],
        distance=torch.from_numpy(distance),
        seed=seed,
        nearest=nearest,
    )


def _draw(
    z: Z, wanted: Int[np.ndarray, "some"], free: Bool[np.ndarray, "latents"], *, nearest: int, seed: int
) -> tuple[Int[np.ndarray, "some"], Float[np.ndarray, "some"]]:
    rng = np.random.Generator(np.random.Philox(seed))
    found, distance = np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted))
    free = free.copy()
    for place in rng.permutation(len(wanted)):
        pool = np.flatnonzero(free)
        far = np.linalg.norm(z[pool] - z[wanted[place]], axis=1)
        pick = rng.choice(np.argsort(far, kind="stable")[:nearest])
        found[place], distance[place] = pool[pick], far[pick]
        free[pool[pick]] = False
    return found, distance


def _standardised(
    density: Float[Tensor, "latents"], norm: Float[Tensor, "latents"], live: Bool[np.ndarray, "latents"]
) -> Z:
    parts = np.stack([part.detach().double().cpu().numpy() for part in (density, norm)], axis=1)
    z = np.log(np.where(live[:, None], parts, 1.0))
    spread = z[live].std(0) if live.any() else np.ones(2)
    return z / np.where(spread > 0, spread, 1.0)


def _check(wanted: np.ndarray, out: np.ndarray, live: Bool[np.ndarray, "latents"]) -> None:
    outside = [int(i) for i in np.concatenate([wanted, out]) if not 0 <= i < len(live)]
    if outside:
        raise ConfigError(f"expected latents from 0 to {len(live) - 1}; got {outside[0]}.")
    if len(np.unique(wanted)) < len(wanted):
        raise ConfigError("expected chosen latents to differ; some are named twice.")
    dead = [int(i) for i in wanted if not live[i]]
    if dead:
        raise ConfigError(
            f"{len(dead)} of the chosen latents are never active or have no norm: nothing matches them.",
            details=[f"latent {i}" for i in dead[:10]],
            hint="Leave dead latents out of the set.",
        )


def _ids(latents: Tensor | Sequence[int]) -> Int[np.ndarray, "some"]:
    return np.asarray(latents.cpu() if isinstance(latents, Tensor) else list(latents), dtype=np.int64)


def _geometric_ratio(pairs: Float[Tensor, "pairs 2"]) -> float | None:
    """Geometric mean of the controls over that of the chosen."""
    return float((pairs[:, 1] / pairs[:, 0]).double().log().mean().exp()) if len(pairs) else None
