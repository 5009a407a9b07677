"""A pair of sources, latent by latent: all that one pass over the analysis set tells of what differs between them.

Norms and classes come from the weights; latent scaling along either side's directions, what drives each latent, how
much each model's activations carry of it, and how twins fire come from the rows. One pass serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.activations import ROLES, ActivationSource
from crosscoder.analysis.amplification import Amplification, Carried, amplification
from crosscoder.analysis.bootstrap import Bootstrap
from crosscoder.analysis.classes import LatentClasses, Twins, twins
from crosscoder.analysis.co_activation import CoActivation, CoActivationSums
from crosscoder.analysis.latent_scaling import LatentScaling, scaling
from crosscoder.analysis.passes import watch
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.analysis.source_activity import SourceActivity, SourceActivitySums
from crosscoder.analysis.specificity import Specificity, specificity
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.ancestry import Ancestry
from crosscoder.crosscoder import Crosscoder
from crosscoder.progress import Progress, silent

_SCALING = ("nu_error", "nu_reconstruction", "nu_activation")


@dataclass(frozen=True)
class PairStatistics:
    """What differs between `classes.a` and `classes.b`.

    `toward_b` scales along b's decoder rows, so that ν near 0 is a latent of b alone; `toward_a` along a's. `twins` are
    a-only and b-only latents that point the same way, and `together` how those fire; None where widths differ.
    `ancestry` says how alike the weights of the two models are, where they are two.
    """

    classes: LatentClasses
    toward_a: LatentScaling
    toward_b: LatentScaling
    specificity: Specificity
    activity: SourceActivity
    amplification: Amplification
    twins: Twins | None
    together: CoActivation | None
    ancestry: Ancestry | None = None

    @property
    def reason(self) -> str | None:
        """Why latent scaling has no meaning for this pair, if so."""
        return self.toward_b.reason

    def columns(self) -> Mapping[str, pa.ChunkedArray]:
        """What diff tables say of every latent beside its class; `_a` and `_b` are the sides it may belong to alone."""
        found: dict[str, pa.ChunkedArray] = {}
        for side, scaled in (("a", self.toward_a), ("b", self.toward_b)):
            table = scaled.table()
            names = [n for n in table.column_names if n.startswith(_SCALING)]
            found |= {f"{name}/{side}": table[name] for name in names}
        scored = self.specificity.table()
        found |= {f"specificity_{name}": scored[name] for name in scored.column_names if "/" in name}
        carried = self.amplification.table()
        found |= {name: carried[name] for name in ("norm_ratio", "own_ratio", "activation_ratio")}
        driven = self.activity.table()
        return found | {name: driven[name] for name in driven.column_names if name == "coherence" or "share/" in name}

    def to_json(self) -> dict[str, Any]:
        """Counts and medians."""
        return {
            "scaling": {"reason": self.reason, "space": self.toward_b.space},
            "ancestry": None if self.ancestry is None else self.ancestry.to_json(),
            "amplification": self.amplification.to_json(),
            "source_activity": self.activity.to_json(),
            "num_twins": None if self.twins is None else len(self.twins.cosine),
            "twins": None if self.together is None else self.together.to_json(),
        }


def pair_statistics(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    classes: LatentClasses,
    *,
    text: AnalysisSet,
    statistics: pa.Table,
    ancestry: Ancestry | None = None,
    progress: Progress = silent,
) -> PairStatistics:
    """Everything about the pair of `classes`, in one pass over `activations`, which are of `text`.

    `statistics` is the table of all latents on the same rows; `ancestry` of the pair's models, where they are two.
    """
    a, b = classes.a, classes.b
    scaled = ScalingSums(crosscoder, [(a, b), (b, a)], bootstrap=Bootstrap(text=text))
    driven = SourceActivitySums(crosscoder)
    found = _twins(crosscoder, classes)
    together = None if found is None else _twin_sums(found, statistics)
    observers = [driven] if together is None else [driven, together]
    watch(
        crosscoder, activations, observers, reconstructions=[scaled], num_rows=int(text.kept.sum()), progress=progress
    )
    toward_b = scaling(scaled, a=a, b=b, ancestry=ancestry)
    toward_a = scaling(scaled, a=b, b=a, ancestry=ancestry)
    return PairStatistics(
        classes=classes,
        toward_a=toward_a,
        toward_b=toward_b,
        specificity=specificity(classes, toward_a, toward_b),
        activity=driven.result,
        amplification=_amplification(crosscoder, classes, (toward_a, toward_b), statistics),
        twins=found,
        together=None if together is None else together.result,
        ancestry=ancestry,
    )


def _twins(crosscoder: Crosscoder, classes: LatentClasses) -> Twins | None:
    if classes.cosine is None:
        return None
    return twins(crosscoder, a=classes.a, b=classes.b, cutoffs=classes.cutoffs)


def _twin_sums(found: Twins, statistics: pa.Table) -> CoActivationSums:
    return CoActivationSums(found.latents_a, found.latents_b, max_values=_column(statistics, "max_value"))


def _amplification(
    crosscoder: Crosscoder, classes: LatentClasses, sides: tuple[LatentScaling, LatentScaling], statistics: pa.Table
) -> Amplification:
    """Of latents that training did not give to one side alone; `sides` scale along a's rows and along b's."""
    among = torch.zeros(len(classes.class_ids), dtype=torch.bool)
    for name in ("shared", "other"):
        among[classes.learned(name).cpu()] = True
    a, b = (Carried.of(crosscoder, side) for side in sides)
    density = {role: _column(statistics, f"density_{role}") for role in ROLES}
    return amplification(a, b, num_active=sides[1].num_active, among=among, density=density)


def _column(table: pa.Table, name: str) -> Float[Tensor, "latents"]:
    return torch.from_numpy(np.array(table[name].to_numpy(), dtype=np.float64))
