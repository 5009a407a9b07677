"""Narrow exclusive concepts: do decoder norms see them, does latent scaling?

16 concepts that two sources share (8 % of rows) and 4 exclusive to each, on 0.5 % of the rows (narrow) or 8 % (common);
32 latents. Every trained crosscoder is read by both scores on rows that it did not train on:

    norms      called by relative norm: below .1 or above .9 (Minder et al. 2025)
    scaling    called exclusive to b at |ν_error| < .2 and |ν_reconstruction| < .5 along b's directions, where β_error
               at b is at least ½; exclusive to a by the reverse pair

A called latent is right when the concept that it matches at its side (cosine above .83) is exclusive to that side. Of
those that are not, some mix exclusive concepts; the nearest concept of others is one that both sources have.
Published figures are of a toy of this shape in the repository pulsatrix: common concepts all found by norms; narrow
ones at a mean relative norm of .76, missed by norms, 4 of 4 found by scaling.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from truth_cells import Arena, Cell, Rows, arenas, train, wiring_of

from crosscoder.analysis import LatentScaling, ScalingSums, relative_norm, scaling
from crosscoder.analysis.latent_scaling import ReconstructionKind
from crosscoder.analysis.passes import watch
from crosscoder.crosscoder import Crosscoder
from crosscoder.initialisation import Across
from crosscoder.synthetic.matching import cosines
from crosscoder.synthetic.presets import BASE, CHAT

CELLS: tuple[tuple[str, Across], ...] = (
    ("batchtopk", "same"),
    ("batchtopk", "independent"),
    ("topk", "same"),
    ("l1", "same"),
)
FIRST_SEED = 100
"""Seeds that no other benchmark has used."""
COSINE, NORM_CUT = 0.83, 0.1


@dataclass(frozen=True)
class Known:
    """What is true of every latent, side by side: its best concept there, how near, and whether that is exclusive."""

    live: Tensor
    concept: Tensor
    cosine: Tensor
    exclusive: Tensor
    num_exclusive: int

    @property
    def right(self) -> Tensor:
        """Live latents that stand for an exclusive concept, by side, (2, latents)."""
        return self.live & (self.cosine > COSINE) & self.exclusive


def toy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per kind of concept, crosscoder, and seed."""
    measured: list[dict[str, Any]] = []
    for kind in ("narrow", "common"):
        arena = arenas()[kind].shrunk() if options.quick else arenas()[kind]
        for seed in range(FIRST_SEED, FIRST_SEED + (1 if options.quick else options.seeds)):
            rows = Rows(arena, seed)
            for sparsity, across in CELLS:
                cell = Cell(kind, "plain", sparsity, seed, across)
                measured.append({"kind": kind, "sparsity": sparsity, "across": across, "seed": seed})
                measured[-1] |= measure(cell, arena, rows)
                print(measured[-1], flush=True)
    return measured


@torch.no_grad()
def measure(cell: Cell, arena: Arena, rows: Rows) -> dict[str, Any]:
    """Recall and false-exclusive rate of every score, and the norms and ratios of latents for exclusive concepts."""
    with torch.enable_grad():
        cc = train(cell, arena, wiring_of(cell, arena, rows.sources), stream=rows)
    sums = ScalingSums(cc, [(BASE, CHAT), (CHAT, BASE)])
    statistics = watch(cc, rows, reconstructions=[sums])
    known = truth(cc, rows, live=statistics.density > 0)
    norms = relative_norm(*cc.decoder_norms().unbind(1))
    full, without = (both(sums, kind) for kind in ("full", "leave_one_out"))
    scores = {
        "norms": torch.stack([norms < NORM_CUT, norms > 1 - NORM_CUT]),
        "scaling": specific(full),
        "scaling, leave one out": specific(without),
        "ν_error alone": specific(full, nu_reconstruction=float("inf")),
        "scaling, whatever β": specific(full, least_beta=-float("inf")),
    }
    exclusive = torch.stack([1 - norms, norms])[known.right]
    return {
        "fve": statistics.fve,
        "num_live": int(known.live.sum()),
        "matched": len(set(known.concept[known.right].tolist())) / known.num_exclusive,
        "mean_relative_norm": float(exclusive.mean()) if len(exclusive) else None,
        "nu_error": [round(v, 3) for v in nus(full, "nu_error")[known.right].tolist()],
        "nu_reconstruction": [round(v, 3) for v in nus(full, "nu_reconstruction")[known.right].tolist()],
        "scores": {name: judged(found, known) for name, found in scores.items()},
    }


def both(sums: ScalingSums, kind: ReconstructionKind) -> tuple[LatentScaling, LatentScaling]:
    """Scaling along the directions of base, and of chat."""
    return (
        scaling(sums, a=CHAT, b=BASE, reconstruction=kind),
        scaling(sums, a=BASE, b=CHAT, reconstruction=kind),
    )


def nus(found: tuple[LatentScaling, LatentScaling], name: str) -> Tensor:
    """One ratio by side, (2, latents)."""
    return torch.stack([getattr(side, name) for side in found])


def specific(found: tuple[LatentScaling, LatentScaling], **cuts: float) -> Tensor:
    """Which latents are exclusive to which side, (2, latents)."""
    return torch.stack([side.specific(**cuts) for side in found])


def truth(cc: Crosscoder, rows: Rows, *, live: Tensor) -> Known:
    """Which concept every latent stands for at either side."""
    world = rows.world.truth
    best = [cosines(cc, world, source=key).max(1) for key in (BASE, CHAT)]
    concept = torch.stack([found.indices for found in best])
    exclusive = torch.stack([world.exclusive_to(key) for key in (BASE, CHAT)])
    return Known(
        live=live,
        concept=concept,
        cosine=torch.stack([found.values for found in best]),
        exclusive=exclusive.gather(1, concept),
        num_exclusive=int(exclusive.sum()),
    )


def judged(found: Tensor, known: Known) -> dict[str, float]:
    """Recall of exclusive concepts; latents called, and the share of live ones that are so wrongly, or are shared."""
    found = found & known.live
    hit = known.concept[found & known.right].unique()
    return {
        "recall": len(hit) / known.num_exclusive,
        "num_called": int(found.any(0).sum()),
        "false_exclusive": float((found & ~known.right).any(0).sum() / known.live.sum()),
        "false_shared": float((found & ~known.exclusive).any(0).sum() / known.live.sum()),
    }
