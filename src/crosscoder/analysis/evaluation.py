"""Evaluation: what a crosscoder keeps of the activations, how sparsely, and what the models lose by it.

Reconstruction (`fve` and kin) is defined in `training.validation`, cross-entropy in `cross_entropy`. All numbers are of
eval mode (calibrated threshold); rows that the run drops (bos, pad) never arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import ActivationSource
from crosscoder.analysis.cross_entropy import CrossEntropy, cross_entropies
from crosscoder.analysis.passes import Observer, ReconstructionObserver, watch
from crosscoder.analysis.replacement import ReplacementModel, replacement_model
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import TextError
from crosscoder.progress import Progress, silent
from crosscoder.training.validation import evaluating

DENSITY_EDGES = np.linspace(-7.0, 0.0, 29)
"""Bins of the density histogram, in powers of ten: four to a decade."""


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one crosscoder on one analysis set; `cross_entropy` is empty when no models were given.

    `replacement` is there for transcoders: the model with all that they write replaced at once.
    """

    num_rows: int
    fve: float
    fve_mean_of_ratios: float
    fve_per_source: Mapping[str, float]
    l0: float
    dead_fraction: float
    density: Float[Tensor, "latents"]
    cross_entropy: Mapping[str, CrossEntropy]
    replacement: ReplacementModel | None = None

    @property
    def ce_recovered(self) -> dict[str, float]:
        """Cross-entropy recovered against zero ablation, by source."""
        return {key: ce.recovered for key, ce in self.cross_entropy.items()}

    @property
    def ce_recovered_mean(self) -> dict[str, float]:
        """Cross-entropy recovered against mean ablation, by source."""
        return {key: ce.recovered_mean for key, ce in self.cross_entropy.items()}

    @property
    def ce_recovered_min(self) -> float | None:
        """The smallest of both, over all sources; None without models, or where one of them is undefined."""
        found = [*self.ce_recovered.values(), *self.ce_recovered_mean.values()]
        return min(found) if found and all(map(math.isfinite, found)) else None

    @property
    def density_histogram(self) -> Int[np.ndarray, "bins"]:
        """How many latents that fire at all have a log10 density in each bin of DENSITY_EDGES."""
        alive = self.density[self.density > 0].cpu().numpy()
        return np.histogram(np.log10(alive).clip(DENSITY_EDGES[0], DENSITY_EDGES[-1]), DENSITY_EDGES)[0]

    def table(self) -> pa.Table:
        """One row per written source."""
        return pa.Table.from_pylist([{"source": key, **numbers} for key, numbers in self._per_source().items()])

    def to_json(self) -> dict[str, Any]:
        """All numbers, densities as a histogram."""
        return {
            "num_rows": self.num_rows,
            "num_latents": len(self.density),
            "fve": self.fve,
            "fve_mean_of_ratios": self.fve_mean_of_ratios,
            "l0": self.l0,
            "dead_fraction": self.dead_fraction,
            "ce_recovered_min": self.ce_recovered_min,
            "sources": self._per_source(),
            "replacement": None if self.replacement is None else asdict(self.replacement),
            "density_histogram": {
                "log10_edges": DENSITY_EDGES.tolist(),
                "num_latents": self.density_histogram.tolist(),
            },
        }

    def _per_source(self) -> dict[str, dict[str, float | int]]:
        return {key: {"fve": fve, **_numbers(self.cross_entropy.get(key))} for key, fve in self.fve_per_source.items()}


def evaluate(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    models: Mapping[str, StudiedModel] | None = None,
    *,
    text: AnalysisSet | None = None,
    num_ce_tokens: int = 20_000,
    observers: Sequence[Observer] = (),
    reconstructions: Sequence[ReconstructionObserver] = (),
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate on all of `activations.contexts()`, and on the models' predictions when `models` and `text` are given.

    `observers` see every batch and its code in the same pass, `reconstructions` (such as `ScalingSums`) what the code
    gives back too. The crosscoder's mode is restored.
    """
    if models is not None and text is None:
        raise TextError(
            "cross-entropy needs the tokens as well as the models.",
            hint="Give text=AnalysisSet, the set that the activations are of.",
        )
    num_rows = None if text is None else int(text.kept.sum())
    statistics = watch(
        crosscoder, activations, observers, reconstructions=reconstructions, num_rows=num_rows, progress=progress
    )
    cross_entropy: dict[str, CrossEntropy] = {}
    replacement: ReplacementModel | None = None
    if models is not None and text is not None:
        with evaluating(crosscoder), torch.no_grad():
            cross_entropy = cross_entropies(crosscoder, models, text, num_tokens=num_ce_tokens, progress=progress)
            replacement = replacement_model(crosscoder, models, text, num_tokens=num_ce_tokens, progress=progress)
    return Evaluation(
        num_rows=statistics.num_rows,
        fve=statistics.fve,
        fve_mean_of_ratios=statistics.fve_mean_of_ratios,
        fve_per_source=statistics.fve_per_source,
        l0=statistics.l0,
        dead_fraction=statistics.dead_fraction,
        density=statistics.density,
        cross_entropy=cross_entropy,
        replacement=replacement,
    )


def _numbers(ce: CrossEntropy | None) -> dict[str, float | int]:
    if ce is None:
        return {}
    return {
        "ce_recovered": ce.recovered,
        "ce_recovered_mean": ce.recovered_mean,
        "ce_clean": ce.clean,
        "ce_spliced": ce.spliced,
        "ce_zero_ablated": ce.zero_ablated,
        "ce_mean_ablated": ce.mean_ablated,
        "ce_num_tokens": ce.num_tokens,
    }
