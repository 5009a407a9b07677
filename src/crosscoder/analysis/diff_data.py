"""From the tables of a run to what its report shows: which latents, with what words around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from crosscoder.analysis.classes import LatentClasses
from crosscoder.analysis.diff_cards import CardMaker, Unmeasured
from crosscoder.analysis.label_scores import LabelScores
from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.analysis.pair import PairStatistics
from crosscoder.analysis.pair_controls import PairControls
from crosscoder.analysis.report import ReportData
from crosscoder.analysis.survivors import NUM_SHOWN, Survivors, survivors
from crosscoder.interventions.effects import LatentEffects
from crosscoder.interventions.patching_curves import PatchingCurves
from crosscoder.sources import SourceSet

NUM_CHANGED = 4
"""Amplified and attenuated latents whose cards are shown, of each."""
MIN_ACTIVE = 10
"""Latents active on fewer held-out rows are not shown: their contexts would be a handful of tokens."""


@dataclass(frozen=True)
class DiffParts:
    """What was measured of a pair, before anything is chosen to be shown; `stale_controls` as in the report."""

    pair: PairStatistics
    evaluation: Mapping[str, Any]
    statistics: pa.Table
    labels: LabelScores | None
    controls: PairControls | None
    stale_controls: bool
    patching: PatchingCurves | Unmeasured

    @property
    def survivors(self) -> dict[str, Survivors]:
        """The latents of each side that survive, or the most extreme ones."""
        return survivors(self.pair.specificity, self.controls)


@dataclass(frozen=True)
class Shown:
    """Which latents the report has cards of; all of them once, in order, are `everything`."""

    most: Mapping[str, Survivors]
    by_wiring: Sequence[int]
    named: Sequence[int]
    changed: Sequence[int]

    @property
    def everything(self) -> list[int]:
        """Latents with a card."""
        of_sides = [latent for side in self.most.values() for latent in side.latents[:NUM_SHOWN]]
        return list(dict.fromkeys([*of_sides, *self.by_wiring, *self.named, *self.changed]))


def shown_latents(parts: DiffParts) -> Shown:
    """The latents to show, each in the first place that wants it."""
    num_active = parts.statistics["num_active"].to_numpy()
    classes = parts.pair.classes
    norms, fixed = classes.relative_norm.cpu().double().numpy(), classes.by_wiring.cpu().numpy()
    used = np.where(fixed & (num_active >= MIN_ACTIVE), num_active, 0)
    by_wiring = [i for end in (1, 0) for i in most_used(used, norms == end, num_shown=NUM_SHOWN // 2)]
    found = parts.survivors
    taken = {latent for side in found.values() for latent in side.latents[:NUM_SHOWN]} | set(by_wiring)
    named = [latent for latent in dict.fromkeys(_best_latents(parts.labels)) if latent not in taken]
    amplified = parts.pair.amplification
    moved = [int(i) for way in ("amplified", "attenuated") for i in amplified.most(way, by="own", num=NUM_CHANGED)]
    return Shown(found, by_wiring, named, [latent for latent in moved if latent not in {*taken, *named}])


def report_data(run: OpenedRun, parts: DiffParts, shown: Shown, *, effects: LatentEffects | Unmeasured) -> ReportData:
    """All that the report of one pair needs."""
    classes = parts.pair.classes
    sides = {latent: side for side, found in shown.most.items() for latent in found.latents}
    cards = CardMaker(run, parts.pair, parts.statistics).cards(shown.everything, effects, sides=sides)
    return ReportData(
        classes=classes,
        facts=_facts(run, classes) | _ancestry(parts.pair),
        evaluation=parts.evaluation,
        density=parts.statistics["density"].to_numpy(),
        cards=cards,
        most=shown.most,
        named=shown.named,
        changed=shown.changed,
        by_wiring=shown.by_wiring,
        labels=parts.labels,
        pair=parts.pair,
        controls=parts.controls,
        stale_controls=parts.stale_controls,
        patching=parts.patching,
        effects=effects,
    )


def most_used(
    num_active: Int[np.ndarray, "latents"], among: Bool[np.ndarray, "latents"], *, num_shown: int
) -> list[int]:
    """The latents active on most rows, of those that are active at all."""
    order = np.argsort(-num_active, kind="stable")
    return [int(i) for i in order if among[i] and num_active[i] > 0][:num_shown]


def add_pair_columns(statistics: pa.Table, pair: PairStatistics) -> pa.Table:
    """The latents' statistics with their class, scaling and scores for one pair."""
    of_pair = pair.classes.table()
    for name in of_pair.column_names[1:]:
        statistics = statistics.append_column(name, of_pair[name])
    for name, column in pair.columns().items():
        statistics = statistics.append_column(name, column)
    return statistics


def _best_latents(labels: LabelScores | None) -> list[int]:
    best = [] if labels is None else [label.best_latent for label in labels.labels]
    return [score.latent for score in best if score is not None and score.latent is not None]


def _facts(run: OpenedRun, classes: LatentClasses) -> dict[str, str]:
    """What was compared, by name."""
    cc, text = run.crosscoder, run.text
    models: Mapping[str, Any] = cc.provenance.get("models", {})
    sides = {"a": SourceSet([cc.writes[classes.a]]), "b": SourceSet([cc.writes[classes.b]])}
    facts = {
        f"{side}: model {alias}": _model(models.get(alias, {}))
        for side, source in sides.items()
        for alias in source.underlying.models
    }
    return facts | {
        "crosscoder": f"{cc.num_latents:,} latents, {cc.nonlinearity!r}, {len(cc.writes)} sources",
        "initial weights": _initial_weights(cc.provenance),
        "analysis set": f"{text.num_tokens:,} held-out tokens in {text.num_contexts:,} contexts "
        f"of {len(text.documents):,} documents; hash {text.hash[:12]}",
        "run": run.out.resolve().name,
    }


def _ancestry(pair: PairStatistics) -> dict[str, str]:
    """Whether the two models descend from one another, which scaling needs."""
    if pair.ancestry is None:
        return {}
    verdict = "one ancestry" if pair.ancestry.shared else "no common ancestry"
    return {"weights": f"{verdict}: cosine {pair.ancestry.cosine:.3f} over {pair.ancestry.comparable:.0%} of them"}


def _initial_weights(provenance: Mapping[str, Any]) -> str:
    """What decides, before any training, whether latents start out shared."""
    init = provenance.get("run", {}).get("init")
    if not init:
        return "not recorded"
    start = "autoencoders of single sources" if init.get("warm_start") else "random directions"
    return f"{start}, {init['across_sources']} across sources, decoder norm {init['decoder_norm']}"


def _model(identity: Mapping[str, Any]) -> str:
    parts = [identity.get("path"), identity.get("commit") or identity.get("revision"), identity.get("adapter")]
    weights = identity.get("weights")
    return ", ".join(str(part) for part in [*parts, weights and f"weights {weights[:12]}"] if part) or "not recorded"
