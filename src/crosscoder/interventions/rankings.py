"""Orders of latents, best first: by one score, or by the sum of their ranks under several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ranked(
    score: Float[Tensor, "latents"], *, among: Int[Tensor, "some"] | None = None, largest: bool = True
) -> Int[Tensor, "ranked"]:
    """The latents (of `among`) by score, the largest first or the other way; those that have none are left out.

    Equal scores keep the order of the latents.
    """
    latents = torch.arange(len(score)) if among is None else among.cpu().sort().values
    own = score.detach().double().cpu()[latents]
    known = own.isfinite()
    return latents[known][own[known].argsort(descending=largest, stable=True)]


def rank_sum(rankings: Sequence[Int[Tensor, "_"]]) -> Int[Tensor, "ranked"]:
    """The latents that all rankings hold, by the sum of their places in them (Minder et al. 2025: of ν^ε and ν^r)."""
    latents, counts = torch.cat(list(rankings)).unique(return_counts=True)
    shared = latents[counts == len(rankings)]
    places = torch.zeros(len(shared), dtype=torch.int64)
    for ranking in rankings:
        order = ranking.argsort()
        places += order[torch.searchsorted(ranking[order], shared)]
    return shared[places.argsort(stable=True)]
