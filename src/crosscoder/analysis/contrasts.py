"""Which latents tell one set of prompts from another.

v_ip is the largest value of latent i in prompt p, 0 where it is inactive; A and B hold n_A and n_B prompts.

    AUROC_i     P(v_iA > v_iB) + ½ P(v_iA = v_iB), above ½ for latents of A; its interval: Newcombe 2006, method 5
    p_i         of the rank test of all ways to deal out the labels A and B (`rank_tests`)
    q_i         Benjamini & Hochberg 1995 over the live latents: those active in at least one prompt of A or B
    p_family    share of the deals in which *any* live latent does as well (Westfall & Young 1993)
    difference  of the shares of prompts on which the latent is active; its interval: Newcombe 1998, method 10

The p of rare latents and small sets are rough; so `by_lot` stands beside what was found: how many latents a deal brings
on average to where the last of them lies. Length is a rival explanation, since a maximum over more tokens is larger:
`auroc_of_length` is what the number of tokens alone tells. And the latents that come first were chosen for it: their
AUROC without that favour is in `held_out_contrast`, where one half of the prompts chooses and the other scores.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.analysis.labelled_rows import joined
from crosscoder.analysis.prompts import PromptCode, PromptValues
from crosscoder.analysis.rank_tests import (
    CentredRanks,
    Deals,
    auroc_interval,
    benjamini_hochberg,
    difference_interval,
    mean_reaching,
    p_values,
)
from crosscoder.analysis.ranking import Truth, auroc, auroc_of_latents
from crosscoder.errors import TextError

LEAST_PROMPTS = 4
"""Prompts on a side, below which nothing could be told from chance."""


@dataclass(frozen=True)
class Contrast:
    """How well each live latent tells A from B; columns are over `latents`, which are those that were tested.

    `level` is the false discovery rate at which latents count as found. `by_lot` is NaN where none is.
    """

    num_a: int
    num_b: int
    num_permutations: int
    level: float
    by_lot: float
    auroc_of_length: float
    latents: Int[Tensor, "tested"]
    auroc: Float[Tensor, "tested"]
    auroc_low: Float[Tensor, "tested"]
    auroc_high: Float[Tensor, "tested"]
    auroc_of_mean: Float[Tensor, "tested"]
    frequency_a: Float[Tensor, "tested"]
    frequency_b: Float[Tensor, "tested"]
    difference: Float[Tensor, "tested"]
    difference_low: Float[Tensor, "tested"]
    difference_high: Float[Tensor, "tested"]
    p: Float[Tensor, "tested"]
    q: Float[Tensor, "tested"]
    p_family: Float[Tensor, "tested"]

    @property
    def order(self) -> Int[Tensor, "tested"]:
        """Places of the latents, those that tell most first."""
        return (self.auroc - 0.5).abs().argsort(descending=True, stable=True)

    @property
    def found(self) -> Int[Tensor, "found"]:
        """The latents with `q <= level`, those that tell most first."""
        order = self.order
        return self.latents[order[self.q[order] <= self.level]]

    def table(self) -> pa.Table:
        """One row per tested latent, those that tell most first."""
        columns = {name: value[self.order] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return pa.table({name: pa.array(value.numpy()) for name, value in columns.items()})

    def to_json(self, num: int | None = None) -> dict[str, Any]:
        """The summary, and the first `num` latents of the table (all by default)."""
        scalars = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        counts = {"num_tested": len(self.latents), "num_found": len(self.found)}
        return {**scalars, **counts, "latents": self.table().slice(0, num).to_pylist()}


@dataclass(frozen=True)
class HeldOutContrast:
    """Latents that one half of the prompts chose (`choosing.found`), and the same on the other half (`scoring`)."""

    choosing: Contrast
    scoring: Contrast

    def to_json(self, num: int | None = None) -> dict[str, Any]:
        """Both."""
        return {"choosing": self.choosing.to_json(num), "scoring": self.scoring.to_json(num)}


@dataclass(frozen=True)
class Firing:
    """Where a latent is active: a token's text and role, in how many rows, and its mean value in them."""

    piece: str
    role: str
    count: int
    mean_value: float

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


@torch.no_grad()
def contrast(
    a: PromptValues,
    b: PromptValues,
    *,
    among: Int[Tensor, "some"] | None = None,
    num_permutations: int = 1000,
    level: float = 0.05,
    seed: int = 0,
) -> Contrast:
    """Every live latent's power to tell the prompts of A from those of B; of `among` alone where they are given.

    `a` and `b` are `PromptCode.per_prompt()`. Raises TextError for fewer than four prompts on a side.
    """
    num_a, num_b = _sizes(a, b)
    maximum, mean = joined([a.maximum, b.maximum]), joined([a.mean, b.mean])
    from_a = torch.arange(num_a + num_b) < num_a
    latents = maximum.latents.unique() if among is None else among.unique()
    ranks, deals = CentredRanks.of(maximum, latents), Deals(from_a, num_permutations, seed)
    p, p_family = p_values(ranks, deals)
    q = benjamini_hochberg(p)
    found_z = ranks.z(from_a[:, None]).abs()[q <= level]
    area = 0.5 + ranks.above_expected(from_a[:, None]).squeeze(1) / (num_a * num_b)
    low, high = auroc_interval(area, num_a, num_b)
    truth = Truth(from_a.numpy(), np.zeros(num_a + num_b, dtype=np.int64))
    return Contrast(
        num_a=num_a,
        num_b=num_b,
        num_permutations=num_permutations,
        level=level,
        by_lot=mean_reaching(ranks, deals, float(found_z.min())) if len(found_z) else float("nan"),
        auroc_of_length=float(auroc(torch.cat([a.num_rows, b.num_rows]).double().numpy(), truth)[0]),
        latents=latents,
        auroc=area,
        auroc_low=low,
        auroc_high=high,
        auroc_of_mean=torch.from_numpy(auroc_of_latents(mean, truth))[latents],
        p=p,
        q=q,
        p_family=p_family,
        **_frequencies(a, b, latents),
    )


def held_out_contrast(
    a: PromptValues,
    b: PromptValues,
    *,
    among: Int[Tensor, "some"] | None = None,
    num_permutations: int = 1000,
    level: float = 0.05,
    seed: int = 0,
) -> HeldOutContrast:
    """One half of the prompts of each set chooses latents (`q <= level`), of `among` where they are given.

    The other half tests these alone.

    Raises TextError for fewer than eight prompts on a side.
    """
    first_a, first_b = (_half(c.maximum.num_rows, seed) for c in (a, b))
    run = partial(contrast, num_permutations=num_permutations, level=level, seed=seed)
    choosing = run(a.of(first_a), b.of(first_b), among=among)
    return HeldOutContrast(choosing, run(a.of(~first_a), b.of(~first_b), among=choosing.found))


def fires_on(code: PromptCode, latent: int, *, num: int = 4) -> tuple[Firing, ...]:
    """The tokens on which a latent is most often active, by their text and role."""
    values = code.values_of(latent)
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for row in values.nonzero().squeeze(1).tolist():
        found[code.text.pieces[int(code.token_of_row[row])], int(code.rows.role[row])].append(float(values[row]))
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), -sum(item[1]) / len(item[1]), item[0]))
    return tuple(Firing(piece, ROLES[role], len(v), sum(v) / len(v)) for (piece, role), v in ordered[:num])


def _frequencies(a: PromptValues, b: PromptValues, latents: Int[Tensor, "tested"]) -> dict[str, Tensor]:
    """The shares of prompts on which latents are active, and their difference with its interval."""
    counts = [torch.bincount(c.maximum.latents, minlength=c.maximum.num_latents)[latents].double() for c in (a, b)]
    num_a, num_b = a.maximum.num_rows, b.maximum.num_rows
    share_a, share_b = counts[0] / num_a, counts[1] / num_b
    low, high = difference_interval(share_a, share_b, num_a=num_a, num_b=num_b)
    return {
        "frequency_a": share_a,
        "frequency_b": share_b,
        "difference": share_a - share_b,
        "difference_low": low,
        "difference_high": high,
    }


def _half(num: int, seed: int) -> Bool[Tensor, "prompts"]:
    """A half of the prompts, drawn; the larger one where the number is odd."""
    chosen = torch.zeros(num, dtype=torch.bool)
    return chosen.index_fill(0, torch.randperm(num, generator=torch.Generator().manual_seed(seed))[::2], True)


def _sizes(a: PromptValues, b: PromptValues) -> tuple[int, int]:
    num_a, num_b = a.maximum.num_rows, b.maximum.num_rows
    if min(num_a, num_b) < LEAST_PROMPTS:
        raise TextError(
            f"expected at least {LEAST_PROMPTS} prompts on each side; got {num_a} of A and {num_b} of B.",
            hint="Fewer cannot be told from chance; a held-out half needs twice as many.",
        )
    return num_a, num_b
