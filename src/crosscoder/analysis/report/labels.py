"""Planted behaviours: which latent finds each best, on documents that did not choose it."""

from __future__ import annotations

from collections.abc import Sequence

from crosscoder.analysis.label_scores import DetectorScore, LabelScore, LabelScores
from crosscoder.analysis.markup import plain, section, table
from crosscoder.analysis.report.data import ReportData, optional


def labels(data: ReportData, scores: LabelScores) -> str:
    """The section: how well the best latent of each label finds it, beside simpler detectors."""
    detectors = list(dict.fromkeys(score.detector for label in scores.labels for score in label.scores))
    head = ["label", "tokens, acting / look-alike", "best latent", "relative norm", "F1", *map(plain, detectors)]
    rows = [_label_row(label, detectors, data) for label in scores.labels]
    absent = f" {scores.num_absent:,} labelled documents are not in the analysis set." if scores.num_absent else ""
    note = (
        "AUROC with 95% intervals. Half of the documents choose a latent and a threshold, the other half is scored, "
        "against look-alike tokens of the same role; template tokens are left out. The baseline is another crosscoder, "
        "such as an autoencoder of a alone; the differences of means have seen the labels and are an upper reference."
        + absent
    )
    return section("Planted behaviours", table(head, rows), identity="labels", note=note)


def _label_row(label: LabelScore, detectors: Sequence[str], data: ReportData) -> list[str]:
    by_name = {score.detector: score for score in label.scores}
    best = label.best_latent
    if best is None or best.latent is None:
        missing = "too few documents to score" if label.num_positive else "not in the analysis set"
        return [
            plain(label.label),
            f"{label.num_positive:,} / {label.num_negative:,}",
            missing,
            "",
            "",
            *[""] * len(detectors),
        ]
    name = f"{best.latent}"
    shown = f'<a href="#latent-{name}">{name}</a>' if best.latent in data.cards else name
    return [
        plain(label.label),
        f"{label.num_positive:,} / {label.num_negative:,}",
        shown,
        optional(best.relative_norm),
        f"{best.f1:.2f}",
        *(_auroc(by_name.get(detector)) for detector in detectors),
    ]


def _auroc(score: DetectorScore | None) -> str:
    if score is None:
        return ""
    return f'{score.auroc:.3f} <span class="range">{score.auroc_low:.2f}–{score.auroc_high:.2f}</span>'
