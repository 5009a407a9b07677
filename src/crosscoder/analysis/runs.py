"""Evaluating and diffing a run: the files beside it.

    evaluation.json  latents.parquet  exemplars.parquet             `evaluate_run`; of all sources at once
    diff/<a>--<b>/{latents.parquet, summary.json, report.html}      `diff_run`; of one pair

Every file is written whole or not at all. `fingerprint` in the JSON files says which crosscoder and analysis set they
are of; a diff evaluates first where that was not done, or was done for others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from crosscoder import files
from crosscoder.analysis.classes import CutOffs, LatentClasses, latent_classes
from crosscoder.analysis.control_plan import short
from crosscoder.analysis.diff_cards import CardMaker, Unmeasured
from crosscoder.analysis.diff_data import DiffParts, add_pair_columns, report_data, shown_latents
from crosscoder.analysis.evaluation import Evaluation, evaluate
from crosscoder.analysis.exemplars import Exemplars
from crosscoder.analysis.label_scores import LabelScores, label_scores
from crosscoder.analysis.labels import read_labels
from crosscoder.analysis.opened_run import OpenedRun, open_crosscoder, open_run
from crosscoder.analysis.pair import PairStatistics, pair_statistics
from crosscoder.analysis.pair_controls import PairControls, read_controls
from crosscoder.analysis.report import report
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.analysis.survivors import Survivors, ranking
from crosscoder.analysis.tables import read_table, write_table
from crosscoder.analysis.tokens import exemplar_table
from crosscoder.errors import SourceMismatch, TokenizerMismatch, UnsupportedSite
from crosscoder.interventions.effects import LatentEffects
from crosscoder.interventions.patching import PatchingPlan, patchable_pair, patching
from crosscoder.interventions.patching_curves import PatchingCurves
from crosscoder.progress import Progress, silent
from crosscoder.training.json_numbers import json_values

log = logging.getLogger(__name__)
EVALUATION, LATENTS, EXEMPLARS = "evaluation.json", "latents.parquet", "exemplars.parquet"
SUMMARY, REPORT = "summary.json", "report.html"
PATCHED_SIZES = (10, 30, 100, 300, 1000)
"""Numbers of latents on the curves of KL patching: enough for a report, at half the cost of the full plan."""


@dataclass(frozen=True)
class Labelled:
    """A labels.jsonl, and a run or crosscoder on some of the same sources whose best latents are scored beside."""

    path: str | Path
    baseline: str | Path | None = None


@dataclass(frozen=True)
class Diff:
    """What a diff found, and the directory it was written to.

    `most` are the latents of each side that survive the controls, or the most extreme ones where there are none;
    `effects` what ablating the latents shown does, and `patching` what their difference carries, or why not.
    """

    path: Path
    pair: PairStatistics
    evaluation: Mapping[str, Any]
    labels: LabelScores | None
    most: Mapping[str, Survivors]
    controls: PairControls | None
    effects: LatentEffects | Unmeasured
    patching: PatchingCurves | Unmeasured

    @property
    def classes(self) -> LatentClasses:
        """The class of every latent, by norms."""
        return self.pair.classes

    @property
    def report(self) -> Path:
        """The report, to be opened in a browser."""
        return self.path / REPORT

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        c = self.classes
        return {
            "a": c.a,
            "b": c.b,
            "cutoffs": asdict(c.cutoffs),
            "classes": c.counts,
            "classes_by_wiring": c.counts_by_wiring,
            "mean_cosine_of_shared": _mean_cosine(c),
            "specific": {side: _surviving(found) for side, found in self.most.items()},
            **self.pair.to_json(),
            "evaluation": {name: self.evaluation[name] for name in ("fve", "l0", "dead_fraction", "ce_recovered_min")},
            "labels": None if self.labels is None else self.labels.to_json(),
            "controls": None if self.controls is None else self.controls.to_json(),
            "effects": None if isinstance(self.effects, Unmeasured) else self.effects.table().to_pylist(),
            "patching": None if isinstance(self.patching, Unmeasured) else self.patching.to_json(),
        }


def evaluate_run(
    path: str | Path,
    *,
    out: str | Path | None = None,
    num_ce_tokens: int = 20_000,
    num_exemplars: int = 10,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a run (or a crosscoder, with `out`) on its held-out set, and write the three files."""
    return _evaluate(
        open_run(path, out=out, progress=progress), num_ce_tokens=num_ce_tokens, num_exemplars=num_exemplars
    )


def diff_run(
    path: str | Path,
    *,
    a: str | None = None,
    b: str | None = None,
    labels: str | Path | Labelled | None = None,
    cutoffs: str | CutOffs = "default",
    num_patched: int = 32,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Diff:
    """Compare two sources of a run and write a directory for the pair.

    `a` and `b` may be left out where there are just two sources. `labels` is a labels.jsonl, alone or with a baseline.
    KL patching is run on `num_patched` contexts; 0 leaves it out. Controls of the pair are read where `run_controls`
    left them, and never trained here. Evaluates first where that is due.
    """
    run = open_run(path, out=out, progress=progress)
    a, b = run.pair(a, b)
    labels = Labelled(labels) if isinstance(labels, str | Path) else labels
    spans = None if labels is None else read_labels(labels.path)
    other = None if labels is None or labels.baseline is None else open_crosscoder(labels.baseline)
    evaluation = _evaluated(run)
    statistics = read_table(run.out / LATENTS, thing="latents")
    density = torch.from_numpy(statistics["density"].to_numpy().copy())
    classes = latent_classes(run.crosscoder, a=a, b=b, cutoffs=cutoffs, density=density)
    pair = _measured(run, classes, statistics)
    scores = None
    if spans is not None:
        scores = label_scores(
            run.crosscoder, run.activations(), run.text, labels=spans, a=a, b=b, baseline=other, progress=progress
        )
    controls = read_controls(run.out, a=classes.a, b=classes.b)
    stale = controls is not None and controls.fingerprint != run.fingerprint
    patched = _patched(run, pair, num_contexts=num_patched)
    parts = DiffParts(pair, evaluation, statistics, scores, None if stale else controls, stale, patched)
    return _write(run, parts)


def _measured(run: OpenedRun, classes: LatentClasses, statistics: pa.Table) -> PairStatistics:
    """The one pass over the analysis set that a diff makes."""
    return pair_statistics(
        run.crosscoder,
        run.activations(),
        classes,
        text=run.text,
        statistics=statistics,
        ancestry=run.ancestry(classes.a, classes.b),
        progress=run.progress,
    )


def _patched(run: OpenedRun, pair: PairStatistics, *, num_contexts: int) -> PatchingCurves | Unmeasured:
    """KL patching from a to b by every score of specificity to b; or why there is none."""
    a, b = pair.classes.a, pair.classes.b
    if num_contexts == 0:
        return Unmeasured("it was not asked for.")
    if run.made_up or any(run.crosscoder.writes[key].difference is not None for key in (a, b)):
        return Unmeasured("no model gives one of the sources: it is made up, or a difference.")
    try:
        patchable_pair(run.crosscoder, run.models, a=a, b=b)
        rankings = {name: ranking(pair.specificity, score=name, side="b") for name in pair.specificity.names}
        plan = PatchingPlan(num_contexts=num_contexts, sizes=PATCHED_SIZES, num_random=2)
        return patching(
            run.crosscoder, run.models, run.text, a=a, b=b, rankings=rankings, plan=plan, progress=run.progress
        )
    except (SourceMismatch, TokenizerMismatch, UnsupportedSite) as error:
        return Unmeasured(error.message)


def _write(run: OpenedRun, parts: DiffParts) -> Diff:
    """Choose what to show, measure its effects, and write the directory of the pair."""
    classes, shown = parts.pair.classes, shown_latents(parts)
    effects = CardMaker(run, parts.pair, parts.statistics).measured_effects(shown.everything)
    for what, found in (("KL patching", parts.patching), ("causal effects", effects)):
        if isinstance(found, Unmeasured):
            log.info("no %s: %s", what, found.reason)
    run.progress("writing the report", 0, 1)
    sources = run.crosscoder.writes
    directory = run.out / "diff" / f"{short(sources, classes.a)}--{short(sources, classes.b)}"
    found = (parts.evaluation, parts.labels, shown.most, parts.controls, effects, parts.patching)
    diff = Diff(directory, parts.pair, *found)
    page = report(report_data(run, parts, shown, effects=effects))
    with files.replacing(directory) as draft:
        draft.mkdir(parents=True)
        write_table(draft / LATENTS, add_pair_columns(parts.statistics, parts.pair), thing="diff_latents")
        summary = {"format": "crosscoder.diff/2", "fingerprint": run.fingerprint} | diff.to_json()
        files.write_json(draft / SUMMARY, json_values(summary))
        (draft / REPORT).write_text(page, encoding="utf-8")
    run.progress("writing the report", 1, 1)
    return diff


def _evaluate(run: OpenedRun, *, num_ce_tokens: int = 20_000, num_exemplars: int = 10) -> Evaluation:
    cc = run.crosscoder
    statistics = LatentStatistics(cc.num_latents)
    exemplars = Exemplars(cc.num_latents, num_exemplars=num_exemplars)
    evaluation = evaluate(
        cc,
        run.activations(),
        run.models_to_splice,
        text=run.text,
        num_ce_tokens=num_ce_tokens,
        observers=(statistics, exemplars),
        progress=run.progress,
    )
    shown = exemplar_table(exemplars.entries, run.text, run.tokenizer, before=exemplars.before)
    write_table(run.out / LATENTS, statistics.table(cc), thing="latents")
    write_table(run.out / EXEMPLARS, shown, thing="exemplars")
    head = {"format": "crosscoder.evaluation/1", "fingerprint": run.fingerprint}
    files.write_json(run.out / EVALUATION, json_values(head | evaluation.to_json()))
    return evaluation


def _evaluated(run: OpenedRun) -> dict[str, Any]:
    """The evaluation of this crosscoder on this analysis set, made now when it is not there."""
    names = (EVALUATION, LATENTS, EXEMPLARS)
    if all((run.out / name).is_file() for name in names):
        there = files.read_json(run.out / EVALUATION, thing="evaluation")
        if there.get("fingerprint") == run.fingerprint:
            return there
    _evaluate(run)
    return files.read_json(run.out / EVALUATION, thing="evaluation")


def _surviving(found: Survivors) -> dict[str, Any]:
    """The latents of one side, and the cut-off they lie beyond, if there is one."""
    cut = None if found.calibrated is None else found.calibrated.cut.value
    return {"score": found.score, "cut_off": cut, "latents": list(found.latents)}


def _mean_cosine(classes: LatentClasses) -> float | None:
    shared = classes.learned("shared")
    return None if classes.cosine is None or not len(shared) else float(classes.cosine[shared].mean())
