"""One cell of the ground-truth benchmark: a crosscoder of one architecture and sparsity, trained and measured.

An *arena* is a world with the size of the crosscoders that are trained on it. Rows of an arena and seed are drawn once
and kept in memory, so that all its crosscoders see the same rows in the same order; worlds, rows and initial weights
differ from seed to seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import exp, log
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder.activations import ActivationSource, Batch, State
from crosscoder.analysis import evaluate
from crosscoder.capture.derived import derived
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, JumpReLU, Nonlinearity, ReLU, TopK
from crosscoder.sources import SourceSet, difference
from crosscoder.synthetic import (
    CUTS,
    ConceptWorld,
    WorldConfig,
    dedicated_toy,
    densities,
    exclusive_recovery,
    exclusivity,
    feb25_toy,
    matching,
    narrow_exclusive,
    null_world,
)
from crosscoder.synthetic.presets import BASE, CHAT
from crosscoder.training import normaliser
from crosscoder.training.config import L1Sparsity, NoSparsity, TanhSparsity, TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import Wiring, acausal, dedicated, designated_shared, sae

ARCHITECTURES = ("plain", "designated", "designated-norm", "dedicated", "difference")
SPARSITIES = ("l1", "l2", "topk", "batchtopk", "jumprelu")
PENALISED = ("l1", "l2", "jumprelu")
LEARNING_RATES = {"l1": 4e-3, "l2": 4e-3, "jumprelu": 4e-3, "topk": 8e-3, "batchtopk": 8e-3}
SHARED_SHARES = {"l1": 0.04, "l2": 0.04, "jumprelu": 0.04, "topk": 0.1, "batchtopk": 0.1}
FIRST_GUESSES = {"l1": 2.0, "l2": 2.8, "jumprelu": 0.4}
Across = Literal["same", "independent"]
NORMALISER_ROWS = 50_000
CALIBRATION_ROWS = 20_000


@dataclass(frozen=True)
class Arena:
    """A world, and how crosscoders are trained on it.

    `k` is the mean number of concepts that fire on a row, rounded up. Penalised sparsities have `coefficients`, found
    by `--tune` on a seed of its own: they give the plain crosscoder the FVE that TopK has there. Equal L0 would be
    unequal quality: ReLU codes have a tail of small values, which grows with the dictionary. `exclusive_share` is the
    share of latents that the dedicated architecture gives to each model.
    """

    name: str
    world: WorldConfig
    num_latents: int
    k: int
    num_rows: int
    coefficients: Mapping[str, float] = field(default_factory=dict[str, float])
    exclusive_share: float = 0.05
    batch_size: int = 512

    def shrunk(self) -> Arena:
        """The same with few rows, to show that everything runs."""
        return replace(self, num_rows=4096, num_latents=min(self.num_latents, 256), batch_size=256)


@dataclass(frozen=True)
class Cell:
    """One training. `pressure` multiplies the tuned coefficient of a penalised sparsity."""

    arena: str
    architecture: str
    sparsity: str
    seed: int
    across: Across = "same"
    pressure: float = 1.0

    @property
    def name(self) -> str:
        """The cell's file, without suffix."""
        sparsity = self.sparsity if self.pressure == 1 else f"{self.sparsity}x{self.pressure:g}"
        return f"{self.arena}--{self.architecture}--{sparsity}--{self.across}--{self.seed}"


class Rows:
    """The rows of one arena and seed, drawn once and served from memory: an ActivationSource."""

    def __init__(self, arena: Arena, seed: int) -> None:
        self.arena, self.seed = arena, seed
        self.world = ConceptWorld(arena.world, seed=seed, num_contexts=64, context_length=256)

    @property
    def sources(self) -> SourceSet:
        """The world's sources."""
        return self.world.sources

    @cached_property
    def x(self) -> Tensor:
        """All rows for training."""
        size = 8192
        parts = self.world.batches(size)
        rows = torch.empty(-(-self.arena.num_rows // size) * size, self.sources.width)
        for first in range(0, len(rows), size):
            rows[first : first + size] = next(parts).x
        return rows

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows in their order, again and again."""
        while True:
            for x in self.x.split(batch_size):
                yield Batch(x)

    def contexts(self) -> Iterator[Batch]:
        """Rows that training never sees."""
        return self.world.contexts()

    def state_dict(self) -> State:
        """No state: a cell is trained in one go."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to restore."""


def arenas() -> dict[str, Arena]:
    """All arenas by name, with the coefficients that `--tune` found on seed 1000."""
    null = {"l1": 2.72, "l2": 3.60, "jumprelu": 7.76}
    listed = [
        Arena(
            "overcomplete",
            feb25_toy("overcomplete"),
            4096,
            k=4,
            num_rows=300_000,
            exclusive_share=0.17,
            coefficients={"l1": 1.63},
        ),
        Arena(
            "tight",
            feb25_toy("tight"),
            1024,
            k=6,
            num_rows=500_000,
            exclusive_share=0.15,
            coefficients={"l1": 1.15, "l2": 1.50, "jumprelu": 0.272},
        ),
        Arena(
            "undercomplete",
            dedicated_toy(512, widths=(64, 64)),
            256,
            k=5,
            num_rows=500_000,
            coefficients={"l1": 1.88, "l2": 2.65, "jumprelu": 0.417},
        ),
        Arena(
            "narrow",
            narrow_exclusive("narrow"),
            32,
            k=2,
            num_rows=500_000,
            exclusive_share=0.2,
            coefficients={"l1": 3.53, "l2": 5.05, "jumprelu": 32.4},
        ),
        Arena(
            "common",
            narrow_exclusive("common"),
            32,
            k=2,
            num_rows=500_000,
            exclusive_share=0.2,
            coefficients={"l1": 3.75, "l2": 4.99, "jumprelu": 32.4},
        ),
        *(
            Arena(f"null-{k}", null_world(k, num_concepts=150), 256, k=3, num_rows=300_000, coefficients=null)
            for k in ("same", "noise", "rotation")
        ),
        Arena(
            "null-crowded",
            null_world("noise", num_concepts=600, noise=0.2),
            256,
            k=12,
            num_rows=300_000,
            coefficients={"l1": 1.54, "l2": 2.18, "jumprelu": 0.447},
        ),
    ]
    return {arena.name: arena for arena in listed}


def run(cell: Cell, rows: Rows) -> dict[str, Any]:
    """Train and measure one cell."""
    arena, sources = rows.arena, rows.sources
    wiring = wiring_of(cell, arena, sources)
    stream: ActivationSource = derived(rows, wiring.sources)
    crosscoder = train(cell, arena, wiring, stream=stream)
    found = evaluate(crosscoder, stream)
    result: dict[str, Any] = {**asdict(cell), "fve": found.fve, "l0": found.l0, "dead_fraction": found.dead_fraction}
    if cell.architecture == "difference":
        return result | {"cuts": {"difference": of_difference(crosscoder, rows, found.density)}}
    matched = matching(crosscoder, rows.world.truth)
    result |= {"mcc": matched.matched_cosine, "mmcs": matched.mean_max_cosine, "recovered": matched.recovered()}
    return result | of_pair(crosscoder, rows, found.density)


def train(cell: Cell, arena: Arena, wiring: Wiring, *, stream: ActivationSource) -> Crosscoder:
    """A trained, calibrated crosscoder."""
    crosscoder = Crosscoder(wiring, nonlinearity_of(cell, arena), seed=cell.seed, across_sources=cell.across)
    some = [batch.x for batch in islice(stream.batches(1000), NORMALISER_ROWS // 1000)]
    fitted = normaliser.fit(stream.sources, some)
    crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
    rate = LEARNING_RATES[cell.sparsity]
    config = TrainConfig(num_tokens=arena.num_rows, batch_size=arena.batch_size, learning_rate=rate)
    Trainer(crosscoder, config, sparsity=sparsity_of(cell, arena)).run(stream)
    crosscoder.calibrate(some[: CALIBRATION_ROWS // 1000])
    return crosscoder.eval()


def wiring_of(cell: Cell, arena: Arena, sources: SourceSet) -> Wiring:
    """The architecture as a wiring; designated latents have a tenth of the penalty, or twice their share of k."""
    n, penalised, share = arena.num_latents, cell.sparsity in PENALISED, SHARED_SHARES[cell.sparsity]
    shared = max(1, round(share * n))
    exclusive = max(1, round(arena.exclusive_share * n))
    match cell.architecture:
        case "plain":
            return acausal(sources, num_latents=n)
        case "designated" | "designated-norm":
            return designated_shared(
                sources,
                shared=shared,
                free=n - shared,
                tied="decoder" if cell.architecture == "designated" else "norm",
                penalty=0.1 if penalised else 1.0,
                k_shared=None if penalised else min(arena.k - 1, max(1, round(2 * share * arena.k))),
            )
        case "dedicated":
            return dedicated(sources, shared=n - 2 * exclusive, exclusive={"base": exclusive, "chat": exclusive})
        case "difference":
            return sae(difference(sources[CHAT], sources[BASE]), num_latents=n)
        case other:
            raise ValueError(f"no architecture is called {other!r}")


def nonlinearity_of(cell: Cell, arena: Arena) -> Nonlinearity:
    """What makes the code sparse."""
    kinds: dict[str, Nonlinearity] = {
        "l1": ReLU(),
        "l2": ReLU(),
        "topk": TopK(arena.k),
        "batchtopk": BatchTopK(arena.k),
        "jumprelu": JumpReLU(),
    }
    return kinds[cell.sparsity]


def sparsity_of(cell: Cell, arena: Arena) -> NoSparsity | L1Sparsity | TanhSparsity:
    """The penalty."""
    if cell.sparsity not in PENALISED:
        return NoSparsity()
    coefficient = cell.pressure * arena.coefficients[cell.sparsity]
    if cell.sparsity == "jumprelu":
        return TanhSparsity(coefficient=coefficient)
    return L1Sparsity(coefficient=coefficient, code_norm="sum" if cell.sparsity == "l1" else "concat")


def of_pair(crosscoder: Crosscoder, rows: Rows, density: Tensor) -> dict[str, Any]:
    """Recovery at every published cut, and how latents spread between the two sources."""
    truth = rows.world.truth
    cuts: dict[str, Any] = {}
    exclusive = truth.exclusive_to(BASE) | truth.exclusive_to(CHAT)
    curve: dict[str, list[tuple[float, bool]]] = {}
    for name, cut in CUTS.items():
        found = exclusive_recovery(crosscoder, truth, a=BASE, b=CHAT, density=density, cuts=cut)
        by_class = densities(found, truth, density=density.cpu())
        numbers = ("recall", "matched_recall", "precision", "false_exclusive_rate", "num_called", "num_shrunk")
        cuts[name] = {key: getattr(found, key) for key in (*numbers, "num_nothing", "num_decoupled")}
        per_shared = 100 / max(1, int(truth.shared.sum()))
        cuts[name] |= {
            "shrunk_per_100": found.num_shrunk * per_shared,
            "decoupled_per_100": found.num_decoupled * per_shared,
            "density_ratio": by_class.ratio,
            "true_density_ratio": by_class.true_ratio,
        }
        frequencies, there = truth.frequencies[exclusive].tolist(), found.recovered[exclusive].tolist()
        curve[name] = [(round(p, 5), hit) for p, hit in zip(frequencies, there, strict=True)]
    shares = live_shares(crosscoder, density).detach()
    spread = {"share_sd": float(shares.std()), "shares": [round(value, 4) for value in shares.sort().values.tolist()]}
    return {"cuts": cuts, "curve": curve, **spread}


def live_shares(crosscoder: Crosscoder, density: Tensor) -> Tensor:
    """`n_b / (n_a + n_b)` of the latents that fire."""
    return exclusivity(crosscoder.decoder_norms("normalised")[density > 0], "share")


def of_difference(crosscoder: Crosscoder, rows: Rows, density: Tensor) -> dict[str, Any]:
    """A difference-SAE has no norms to compare: every live latent claims a difference.

    A concept exclusive to chat has the direction c there, one exclusive to base −c; shared ones have what differs.
    """
    truth = rows.world.truth
    planted = truth.directions[CHAT] - truth.directions[BASE]
    exclusive = truth.exclusive_to(BASE) | truth.exclusive_to(CHAT)
    decoder = crosscoder.decoder_rows(crosscoder.writes.keys[0], space="raw")[density > 0]
    near = _unit(decoder) @ _unit(planted).T > CUTS["dfc"].cosine
    right = near[:, exclusive].any(1)
    false = float((~right).double().mean()) if len(right) else float("nan")
    recall = float(near[:, exclusive].any(0).double().mean()) if bool(exclusive.any()) else float("nan")
    return {
        "recall": recall,
        "matched_recall": recall,
        "precision": 1 - false,
        "false_exclusive_rate": false,
        "num_called": len(right),
    }


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class Tuned:
    """A coefficient with what it gives the plain crosscoder, and the FVE that was wanted."""

    coefficient: float
    fve: float
    l0: float
    target: float


def tune(arena: Arena, rows: Rows, *, steps: int = 5, tolerance: float = 0.01) -> Iterator[tuple[str, Tuned]]:
    """For every penalised sparsity, the coefficient at which the plain crosscoder has TopK's FVE."""
    target, _ = quality(arena, "topk", rows)
    for sparsity in PENALISED:
        tried: list[Tuned] = []
        coefficient = FIRST_GUESSES[sparsity]
        while len(tried) < steps and not (tried and abs(tried[-1].fve - target) < tolerance):
            fve, l0 = quality(replace(arena, coefficients={sparsity: coefficient}), sparsity, rows)
            tried.append(Tuned(coefficient, fve, l0, target))
            coefficient = _next(tried)
        yield sparsity, min(tried, key=lambda one: abs(one.fve - target))


def quality(arena: Arena, sparsity: str, rows: Rows) -> tuple[float, float]:
    """FVE and L0 on held-out rows of a plain crosscoder."""
    cell = Cell(arena.name, "plain", sparsity, rows.seed)
    found = evaluate(train(cell, arena, wiring_of(cell, arena, rows.sources), stream=rows), rows)
    return found.fve, found.l0


def _next(tried: list[Tuned]) -> float:
    """Secant step of log(1 − FVE) on log coefficient, by a factor of 3 at most."""
    points = [(log(one.coefficient), log(1 - one.fve)) for one in tried]
    slope = 0.7
    if len(points) > 1 and points[-1][0] != points[-2][0]:
        slope = max(0.2, (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0]))
    step = (log(1 - tried[-1].target) - points[-1][1]) / slope
    return exp(points[-1][0] + max(-log(3), min(log(3), step)))
