"""Evaluating and diffing a run: the files beside it.

    evaluation.json  latents.parquet  exemplars.parquet             `evaluate_run`; of all sources at once
    diff/<a>--<b>/{latents.parquet, summary.json, report.html}      `diff_run`; of one pair

Every file is written whole or not at all. `fingerprint` in the JSON files says which crosscoder and analysis set they
are of; a diff evaluates first where that was not done, or was done for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from crosscoder import files
from crosscoder.analysis.classes import CutOffs, LatentClasses, latent_classes, source_pair
from crosscoder.analysis.diff_data import add_class_columns, report_data
from crosscoder.analysis.evaluation import Evaluation, evaluate
from crosscoder.analysis.exemplars import Exemplars
from crosscoder.analysis.label_scores import LabelScores, label_scores
from crosscoder.analysis.labels import read_labels
from crosscoder.analysis.opened_run import OpenedRun, open_crosscoder, open_run
from crosscoder.analysis.report import report
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.analysis.tables import read_table, write_table
from crosscoder.analysis.tokens import exemplar_table
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.progress import Progress, silent
from crosscoder.training.json_numbers import json_values

EVALUATION, LATENTS, EXEMPLARS = "evaluation.json", "latents.parquet", "exemplars.parquet"
SUMMARY, REPORT = "summary.json", "report.html"


@dataclass(frozen=True)
class Diff:
    """What a diff found, and the directory it was written to."""

    path: Path
    classes: LatentClasses
    evaluation: Mapping[str, Any]
    labels: LabelScores | None

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
            "evaluation": {name: self.evaluation[name] for name in ("fve", "l0", "dead_fraction", "ce_recovered_min")},
            "labels": None if self.labels is None else self.labels.to_json(),
            "null_control": None,
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
    labels: str | Path | None = None,
    baseline: str | Path | None = None,
    cutoffs: str | CutOffs = "default",
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Diff:
    """Compare two sources of a run and write a directory for the pair.

    `a` and `b` may be left out where there are just two sources. `labels` is a labels.jsonl; `baseline` a run or
    crosscoder on some of the same sources, whose best latents stand beside. Evaluates first where that is due.
    """
    run = open_run(path, out=out, progress=progress)
    a, b = _pair(run.crosscoder, a, b)
    spans = None if labels is None else read_labels(labels)
    other = None if baseline is None else open_crosscoder(baseline)
    evaluation = _evaluated(run)
    statistics = read_table(run.out / LATENTS, thing="latents")
    density = torch.from_numpy(statistics["density"].to_numpy().copy())
    classes = latent_classes(run.crosscoder, a=a, b=b, cutoffs=cutoffs, density=density)
    scores = None
    if spans is not None:
        scores = label_scores(
            run.crosscoder, run.activations(), run.text, labels=spans, a=a, b=b, baseline=other, progress=progress
        )
    directory = run.out / "diff" / f"{_short(run.crosscoder, classes.a)}--{_short(run.crosscoder, classes.b)}"
    diff = Diff(directory, classes, evaluation, scores)
    progress("writing the report", 0, 1)
    page = report(report_data(run, classes, evaluation=evaluation, statistics=statistics, labels=scores))
    with files.replacing(directory) as draft:
        draft.mkdir(parents=True)
        write_table(draft / LATENTS, add_class_columns(statistics, classes), thing="diff_latents")
        summary = {"format": "crosscoder.diff/1", "fingerprint": run.fingerprint} | diff.to_json()
        files.write_json(draft / SUMMARY, json_values(summary))
        (draft / REPORT).write_text(page, encoding="utf-8")
    progress("writing the report", 1, 1)
    return diff


def _evaluate(run: OpenedRun, *, num_ce_tokens: int = 20_000, num_exemplars: int = 10) -> Evaluation:
    cc = run.crosscoder
    statistics = LatentStatistics(cc.num_latents)
    exemplars = Exemplars(cc.num_latents, num_exemplars=num_exemplars)
    encoders = any(model.architecture.family.encoder for model in run.models.values())
    evaluation = evaluate(
        cc,
        run.activations(),
        None if encoders else run.models,
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


def _pair(crosscoder: Crosscoder, a: str | None, b: str | None) -> tuple[str, str]:
    """The two sources to compare; the only two when none is named."""
    keys = crosscoder.writes.keys
    if a is None and b is None and len(keys) == 2:
        return keys[0], keys[1]
    if a is None or b is None:
        raise SourceMismatch(
            f"this crosscoder writes {len(keys)} sources; which two are to be compared?"
            if len(keys) > 1
            else "a diff compares two sources; this crosscoder writes one.",
            details=crosscoder.writes.describe(),
            hint="Name both: a=..., b=... (--a, --b), by key or by model alias.",
        )
    source_a, source_b = source_pair(crosscoder, a=a, b=b)
    return source_a.key, source_b.key


def _short(crosscoder: Crosscoder, key: str) -> str:
    """A source's name as part of a path: the model's alias where that says it all."""
    source = crosscoder.writes[key]
    alone = sum(other.model == source.model for other in crosscoder.writes) == 1
    return source.model if alone else key.replace("/", ".")


def _mean_cosine(classes: LatentClasses) -> float | None:
    shared = classes.learned("shared")
    return None if classes.cosine is None or not len(shared) else float(classes.cosine[shared].mean())
