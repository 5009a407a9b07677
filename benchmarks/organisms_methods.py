"""What each method says of every latent: how specific it is to the organism, and how well it detects the plant.

    norm                  relative decoder norm of a plain crosscoder
    scaling               1 − max(|ν_error|, |ν_reconstruction|) of its latents                (crosscoder.analysis)
    joint                 the smaller of both
    dedicated             latents that the wiring gave to the organism alone, by strength
    dedicated, scaling    the same latents, by scaling
    designated            relative norm of the latents that are not tied
    difference-SAE        latents of an autoencoder of x_organism − x_plain, by strength
    mean difference       no dictionary: rows by their projection of x_organism − x_plain on its mean

Strength of a latent: root mean square of what it writes to the organism over the rows on which it is active, in units
of the organism's activations about their mean. A wiring says what a latent can write, not how much; some order is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from organisms_rows import AFTER, BEFORE, Rows
from torch import Tensor

from crosscoder.activations import ROLES, ActivationSource
from crosscoder.analysis import evaluate, latent_classes, latent_scaling
from crosscoder.analysis.label_scores import choosing_half
from crosscoder.analysis.labelled_rows import select_rows
from crosscoder.analysis.ranking import Truth, auroc, auroc_of_latents
from crosscoder.analysis.specificity import scaling_specificity, specificity
from crosscoder.capture.derived import derived
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK
from crosscoder.sources import SourceSet, difference
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import Wiring, acausal, dedicated, designated_shared, sae

READINGS = {
    "norm": "plain",
    "scaling": "plain",
    "joint": "plain",
    "dedicated": "dedicated",
    "dedicated, scaling": "dedicated",
    "designated": "designated",
    "difference-SAE": "difference",
}
"""Methods, and the dictionary that each reads; the mean difference has none."""
DICTIONARIES = tuple(dict.fromkeys(READINGS.values()))
Detections = dict[str, dict[str, list[float]]]
"""AUROC of every latent, by label and by half of the documents: `choosing`, `scoring`."""
MIN_ACTIVE = 10
"""Latents that are active on fewer held-out rows have no part in a comparison."""
CALIBRATION_ROWS = 16_384


@dataclass(frozen=True)
class Shape:
    """Latents, active ones per row, and rows that training sees (each several times)."""

    num_latents: int
    k: int
    num_tokens: int
    batch_size: int = 1024
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Dictionary:
    """One trained crosscoder, the code of all held-out rows, and how good it is."""

    crosscoder: Crosscoder
    code: SparseCode
    quality: Mapping[str, float]

    @property
    def num_active(self) -> Int[Tensor, "latents"]:
        """Held-out rows on which each latent is active."""
        return torch.bincount(self.code.latents, minlength=self.code.num_latents)


@dataclass(frozen=True)
class Case:
    """One label on the held-out rows of one role: which it speaks of, the truth, and which of them choose."""

    name: str
    rows: Bool[np.ndarray, "all_rows"]
    truth: Truth
    choosing: Bool[np.ndarray, "rows"]

    def of_score(self, score: Float[np.ndarray, "rows"]) -> tuple[float, float]:
        """AUROC on the choosing half, and on the other, with the sign that the choosing half prefers."""
        halves = [float(auroc(score[half], self.truth.of(half))[0]) for half in (self.choosing, ~self.choosing)]
        return (halves[0], halves[1]) if halves[0] >= 0.5 else (1 - halves[0], 1 - halves[1])


def wiring_of(dictionary: str, sources: SourceSet, shape: Shape) -> Wiring:
    """The wiring of a dictionary: a tenth of the latents for each model alone, or half that both share, tied.

    Exclusive latents have a k of their own, 1 a row for each model: where all compete for one budget, hardly one lives,
    since it explains half as much as a shared one.
    """
    n = shape.num_latents
    match dictionary:
        case "plain":
            return acausal(sources, num_latents=n)
        case "dedicated":
            own: dict[str, int] = dict.fromkeys((BEFORE, AFTER), n // 10)
            return dedicated(sources, shared=n - 2 * (n // 10), exclusive=own, k_exclusive=dict.fromkeys(own, 1))
        case "designated":
            k_shared = shape.k // 2
            return designated_shared(sources, shared=n // 2, free=n - n // 2, penalty=1.0, k_shared=k_shared)
        case "difference":
            after, before = (sources.resolve(alias) for alias in (AFTER, BEFORE))
            return sae(difference(after, before), num_latents=n // 2)
        case other:
            raise ValueError(f"no dictionary is called {other!r}")


def train(dictionary: str, rows: Rows, shape: Shape) -> Dictionary:
    """Train, calibrate and measure one dictionary; the seed is that of the rows."""
    wiring = wiring_of(dictionary, rows.sources, shape)
    stream: ActivationSource = derived(rows, wiring.sources)
    crosscoder = Crosscoder(wiring, BatchTopK(shape.k if dictionary != "difference" else shape.k // 2), seed=rows.seed)
    some = [next(stream.batches(CALIBRATION_ROWS)).x]
    fitted = normaliser.fit(stream.sources, some)
    crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
    config = TrainConfig(
        num_tokens=shape.num_tokens, batch_size=shape.batch_size, learning_rate=shape.learning_rate, decay_fraction=0.5
    )
    Trainer(crosscoder, config).run(stream)
    crosscoder.calibrate(some[0].split(1024))
    crosscoder.eval()
    found = evaluate(crosscoder, stream)
    with torch.no_grad():
        code = SparseCode.below_each_other([crosscoder.encode(batch.x) for batch in stream.contexts()])
    return Dictionary(crosscoder, code, {"fve": found.fve, "l0": found.l0, "dead_fraction": found.dead_fraction})


@torch.no_grad()
def scores(dictionary: str, trained: Dictionary, rows: Rows) -> dict[str, Float[Tensor, "latents"]]:
    """How specific every latent is to the organism, by each method that reads this dictionary; NaN without a part."""
    dead = trained.num_active < MIN_ACTIVE
    match dictionary:
        case "plain":
            found = {name: _specific(trained, rows, name) for name in ("norm", "scaling", "joint")}
        case "designated":
            found = {"designated": _specific(trained, rows, "norm")}
        case "dedicated":
            own = trained.crosscoder.wiring.latent_ranges[-1]
            others = torch.ones(trained.crosscoder.num_latents, dtype=torch.bool)
            others[slice(*own)] = False
            scaled = latent_scaling(trained.crosscoder, rows, a=BEFORE, b=AFTER, bootstrap=None)
            found = {"dedicated": strength(trained, rows), "dedicated, scaling": scaling_specificity(scaled)}
            found = {name: score.masked_fill(others, torch.nan) for name, score in found.items()}
        case _:
            found = {"difference-SAE": strength(trained, rows)}
    return {name: score.double().masked_fill(dead, torch.nan) for name, score in found.items()}


def _specific(trained: Dictionary, rows: Rows, name: str) -> Float[Tensor, "latents"]:
    cc = trained.crosscoder
    toward_a = latent_scaling(cc, rows, a=AFTER, b=BEFORE, bootstrap=None)
    toward_b = latent_scaling(cc, rows, a=BEFORE, b=AFTER, bootstrap=None)
    classes = latent_classes(cc, a=BEFORE, b=AFTER)
    return specificity(classes, toward_a, toward_b, min_active=MIN_ACTIVE).score(name, "b")


def strength(trained: Dictionary, rows: Rows) -> Float[Tensor, "latents"]:
    """`√(E[f² | active]) ‖d‖ / √(E‖x − E x‖²)` in raw space: d is written to the organism, or to the difference."""
    code, cc = trained.code, trained.crosscoder
    squares = torch.zeros(code.num_latents, dtype=torch.float64)
    squares.index_add_(0, code.latents, code.values.detach().double() ** 2)
    norm = cc.decoder_rows(cc.writes.keys[-1], space="raw").detach().double().norm(dim=1)
    x = rows.held_out[:, rows.sources.slices[rows.sources.resolve(AFTER).key]].double()
    size = (x - x.mean(0)).square().sum(1).mean().sqrt()
    return (squares / trained.num_active.clamp(min=1)).sqrt() * norm / size


def cases(rows: Rows) -> list[Case]:
    """The labels that can be scored: of roles in which both the plant and its look-alike occur, template left out."""
    if rows.labels is None:
        return []
    tokens, hashes = rows.tokens, [document.hash for document in rows.text.documents]
    role = rows.text.roles.numpy()[tokens].astype(np.int64)
    document = rows.text.document.numpy()[tokens].astype(np.int64)
    found: list[Case] = []
    for name, values in zip(rows.labels.names, rows.labels.values[:, tokens], strict=True):
        both = set(role[values == 1]) & set(role[values == -1]) - {ROLES.index("template")}
        chosen = (values != 0) & np.isin(role, list(both))
        truth = Truth(values[chosen] == 1, role[chosen])
        found.append(Case(name, chosen, truth, choosing_half(document[chosen], truth.positive, hashes)))
    return found


def detections(trained: Dictionary, of: list[Case]) -> Detections:
    """AUROC of every latent for every label: on the documents that choose, and on the others."""
    found: Detections = {}
    for case in of:
        dense = select_rows(trained.code, case.rows)
        halves = {"choosing": case.choosing, "scoring": ~case.choosing}
        found[case.name] = {
            name: auroc_of_latents(select_rows(dense, half), case.truth.of(half)).round(4).tolist()
            for name, half in halves.items()
        }
    return found


def mean_difference(rows: Rows) -> tuple[Float[Tensor, "width"], float]:
    """The unit vector along the mean of x_organism − x_plain, and its length over that of a typical activation."""
    parts = rows.sources.unpack(rows.x)
    after, before = (parts[rows.sources.resolve(alias).key].double() for alias in (AFTER, BEFORE))
    mean = (after - before).mean(0)
    size = (after - after.mean(0)).square().sum(1).mean().sqrt()
    return (mean / mean.norm()).float(), float(mean.norm() / size)


def direction_detections(rows: Rows, direction: Float[Tensor, "width"], of: list[Case]) -> dict[str, Any]:
    """AUROC of the projection of x_organism − x_plain, for every label."""
    parts = rows.sources.unpack(rows.held_out)
    after, before = (parts[rows.sources.resolve(alias).key] for alias in (AFTER, BEFORE))
    score = ((after - before) @ direction).double().numpy()
    return {case.name: dict(zip(("choosing", "scoring"), case.of_score(score[case.rows]), strict=True)) for case in of}
