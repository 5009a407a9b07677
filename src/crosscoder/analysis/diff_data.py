"""From the tables of a run to what its report shows: which latents, with what words around them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from crosscoder.analysis.classes import LatentClasses
from crosscoder.analysis.label_scores import LabelScores
from crosscoder.analysis.latent_cards import LatentCard
from crosscoder.analysis.logit_lens import logit_lens
from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.analysis.report import ReportData
from crosscoder.analysis.tables import read_table
from crosscoder.errors import UnsupportedSite
from crosscoder.sources import SourceSet

log = logging.getLogger(__name__)
NUM_SHOWN = 12
MIN_ACTIVE = 10
"""Latents active on fewer held-out rows are not shown as most specific: their contexts would be a handful of tokens."""


def report_data(
    run: OpenedRun,
    classes: LatentClasses,
    *,
    evaluation: Mapping[str, Any],
    statistics: pa.Table,
    labels: LabelScores | None,
) -> ReportData:
    """All that the report of one pair needs."""
    norms = classes.relative_norm.cpu().double().numpy()
    usable = statistics["num_active"].to_numpy() >= MIN_ACTIVE
    fixed = classes.by_wiring.cpu().numpy()
    most_a, most_b = most_specific(norms, usable & ~fixed, num_shown=NUM_SHOWN)
    used = np.where(usable & fixed, statistics["num_active"].to_numpy(), 0)
    most_a += most_used(used, norms == 0, num_shown=NUM_SHOWN // 2)
    most_b += most_used(used, norms == 1, num_shown=NUM_SHOWN // 2)
    named = _best_latents(labels)
    shown = list(dict.fromkeys([*most_a, *most_b, *named]))
    return ReportData(
        classes=classes,
        facts=_facts(run, classes),
        evaluation=evaluation,
        density=statistics["density"].to_numpy(),
        cards=_cards(run, classes, statistics=statistics, latents=shown),
        most_a=most_a,
        most_b=most_b,
        named=[latent for latent in named if latent not in {*most_a, *most_b}],
        labels=labels,
    )


def most_specific(
    norms: Float[np.ndarray, "latents"], usable: Bool[np.ndarray, "latents"], *, num_shown: int
) -> tuple[list[int], list[int]]:
    """Usable latents with the smallest relative norms below ½, and with the largest above it, most extreme first."""
    order = np.argsort(norms, kind="stable")
    order = order[usable[order] & np.isfinite(norms[order])]
    low = [int(i) for i in order if norms[i] < 0.5][:num_shown]
    high = [int(i) for i in order[::-1] if norms[i] > 0.5][:num_shown]
    return low, high


def most_used(
    num_active: Int[np.ndarray, "latents"], among: Bool[np.ndarray, "latents"], *, num_shown: int
) -> list[int]:
    """The latents active on most rows, of those that are active at all."""
    order = np.argsort(-num_active, kind="stable")
    return [int(i) for i in order if among[i] and num_active[i] > 0][:num_shown]


def add_class_columns(statistics: pa.Table, classes: LatentClasses) -> pa.Table:
    """The latents' statistics with their class, relative norm and cosine for one pair."""
    of_pair = classes.table()
    for name in of_pair.column_names[1:]:
        statistics = statistics.append_column(name, of_pair[name])
    return statistics


def _best_latents(labels: LabelScores | None) -> list[int]:
    best = [] if labels is None else [label.best_latent for label in labels.labels]
    return [score.latent for score in best if score is not None and score.latent is not None]


def _cards(
    run: OpenedRun, classes: LatentClasses, *, statistics: pa.Table, latents: Sequence[int]
) -> dict[int, LatentCard]:
    exemplars: dict[int, list[dict[str, Any]]] = {latent: [] for latent in latents}
    for row in read_table(run.out / "exemplars.parquet", thing="exemplars", latents=latents).to_pylist():
        exemplars[row["latent"]].append(row)
    rows = statistics.take(pa.array(latents, pa.int64())).to_pylist()
    promoted, without_lens = _promoted(run, classes, latents)
    fixed = classes.by_wiring.tolist()
    return {
        latent: LatentCard(
            latent=latent,
            relative_norm=float(classes.relative_norm[latent]),
            cosine=None if classes.cosine is None or fixed[latent] else float(classes.cosine[latent]),
            by_wiring=bool(fixed[latent]),
            statistics=row,
            promoted={source: pieces[latent] for source, pieces in promoted.items()},
            exemplars=sorted(exemplars[latent], key=lambda exemplar: exemplar["rank"]),
            without_lens=without_lens,
        )
        for latent, row in zip(latents, rows, strict=True)
    }


def _promoted(
    run: OpenedRun, classes: LatentClasses, latents: Sequence[int]
) -> tuple[dict[str, dict[int, list[str]]], dict[str, str]]:
    """Promoted tokens by source and latent; and by source why not, where no head of the model reads it."""
    promoted: dict[str, dict[int, list[str]]] = {}
    without_lens: dict[str, str] = {}
    for key in (classes.a, classes.b) if latents else ():
        source = run.crosscoder.writes[key]
        if source.difference is not None:
            without_lens[key] = f"{key} is a difference of two models, which no head reads"
            continue
        model = run.models[source.model]
        try:
            promoted[key] = logit_lens(run.crosscoder, model, source=key, latents=latents).pieces(model.tokenizer)
        except UnsupportedSite as error:
            log.warning("no logit lens at %s: %s", key, error.message)
            without_lens[key] = error.message
    return promoted, without_lens


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
