"""The report of a diff: one HTML file that loads nothing, runs nothing, and says what it does not know.

The head states what was compared and that there was no control; then the numbers, the plots, the labels, and the
latents that are most specific to either side, with their contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.analysis.classes import CLASSES, CUTOFFS, CutOffs, LatentClasses
from crosscoder.analysis.label_scores import DetectorScore, LabelScore, LabelScores
from crosscoder.analysis.latent_cards import LatentCard
from crosscoder.analysis.markup import figure, page, plain, section, table
from crosscoder.analysis.plots import bars, steps

_NORM_EDGES = np.linspace(0.0, 1.0, 51)
_COSINE_EDGES = np.linspace(-1.0, 1.0, 41)
_DENSITY_EDGES = np.linspace(-6.0, 0.0, 25)
_KINDS = {"a-only": "a", "shared": "shared", "b-only": "b", "other": "other"}
NO_CONTROL = (
    "This report has no null control. Cut-offs of relative norms are set by hand, and training alone spreads the "
    "norms: how many latents lie beyond a cut-off means something only beside a crosscoder of two sources that do not "
    "differ."
)


@dataclass(frozen=True)
class ReportData:
    """All that a report says. `facts` are names and values for the head; `evaluation` is evaluation.json.

    `density` and `cards` belong to the latents of `classes`; `named` are best latents of labels that are not among the
    most specific.
    """

    classes: LatentClasses
    facts: Mapping[str, str]
    evaluation: Mapping[str, Any]
    density: np.ndarray
    cards: Mapping[int, LatentCard]
    most_a: Sequence[int]
    most_b: Sequence[int]
    named: Sequence[int] = ()
    labels: LabelScores | None = None
    exemplars_per_card: int = 5


def report(data: ReportData) -> str:
    """The whole page as HTML."""
    parts = [_numbers(data), _plots(data)]
    if data.labels is not None:
        parts += [_labels(data, data.labels), _named(data)]
    parts += [_latents(data, "b", data.most_b), _latents(data, "a", data.most_a)]
    title = f"{data.classes.a} and {data.classes.b}: what differs"
    return page(title, f"{_head(data)}<main>{''.join(parts)}</main>{_foot()}")


def _head(data: ReportData) -> str:
    a, b = plain(data.classes.a), plain(data.classes.b)
    facts = "".join(f"<dt>{plain(name)}</dt><dd>{plain(value)}</dd>" for name, value in data.facts.items())
    control = f'<div class="warning"><p>{plain(NO_CONTROL)}</p></div>'
    return (
        '<header class="top"><p class="kicker">Crosscoder diff</p>'
        f'<h1><span class="a">{a}</span><span class="versus"> against </span><span class="b">{b}</span></h1>'
        f'<p class="lead">{_summary(data)}</p>{control}<dl class="facts">{facts}</dl></header>'
    )


def _summary(data: ReportData) -> str:
    counts, cuts = data.classes.counts, data.classes.cutoffs
    alive = sum(counts.values()) - counts["dead"] - counts["elsewhere"]
    name = "relative norm" if cuts.statistic == "relative_norm" else "share of the norms"
    return (
        f"Of {alive:,} latents that fire on the held-out text, {counts['a-only']:,} write to "
        f'<span class="side-a">a</span> alone ({name} below {cuts.a_only:g}), {counts["b-only"]:,} to '
        f'<span class="side-b">b</span> alone (above {cuts.b_only:g}), and {counts["shared"]:,} to both alike '
        f"({cuts.shared[0]:g} to {cuts.shared[1]:g}); {counts['other']:,} lie between.{_fixed(data)}"
    )


def _fixed(data: ReportData) -> str:
    """What is no finding, since the wiring says so."""
    fixed = {name: n for name, n in data.classes.counts_by_wiring.items() if name not in ("dead", "elsewhere")}
    elsewhere = data.classes.counts["elsewhere"]
    parts = ", ".join(f"{count:,} {name}" for name, count in fixed.items())
    said = f" The wiring, not training, decides the class of {parts}." if fixed else ""
    return said + (f" {elsewhere:,} latents can write neither and are left out." if elsewhere else "")


def _numbers(data: ReportData) -> str:
    e = data.evaluation
    tiles = {
        "fraction of variance explained": f"{e['fve']:.3f}",
        "active latents per row": f"{e['l0']:.1f}",
        "latents that never fire": f"{e['dead_fraction']:.1%}",
        "cross-entropy recovered, at least": _optional(e["ce_recovered_min"]),
        "held-out rows": f"{e['num_rows']:,}",
    }
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    rows = [
        [
            f"<code>{plain(key)}</code>",
            f"{s['fve']:.3f}",
            *(_optional(s.get(name)) for name in ("ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated")),
            *(_optional(s.get(name)) for name in ("ce_recovered", "ce_recovered_mean")),
        ]
        for key, s in e["sources"].items()
    ]
    head = ["source", "FVE", "CE clean", "CE spliced", "CE zero", "CE mean", "recovered (zero)", "recovered (mean)"]
    note = (
        "On held-out text. Cross-entropy (CE) in nats per token, with one source at a time replaced by its "
        "reconstruction (spliced), by zero, or by its mean; dropped positions keep their own activation."
    )
    return section(
        "How well it reads the models",
        f'<div class="numbers">{shown}</div>',
        table(head, rows),
        identity="numbers",
        note=note,
    )


def _plots(data: ReportData) -> str:
    drawn = [_norm_plot(data)]
    if data.classes.cosine is not None:
        drawn.append(_cosine_plot(data))
    drawn.append(_density_plot(data))
    note = (
        "Decoder norms are of normalised space, in which both sources have the same energy. Dead latents are left out, "
        "and those whose norms the wiring fixed."
    )
    return section(
        "Where the latents write", f'<div class="figures">{"".join(drawn)}</div>', identity="norms", note=note
    )


def _norm_plot(data: ReportData) -> str:
    left_out = [CLASSES.index(name) for name in ("dead", "elsewhere")]
    fixed = data.classes.by_wiring.cpu().numpy()
    alive = ~np.isin(data.classes.class_ids.cpu().numpy(), left_out) & ~fixed
    norms = data.classes.relative_norm.cpu().numpy()[alive]
    counts = np.histogram(norms[np.isfinite(norms)], _NORM_EDGES)[0]
    centres = (_NORM_EDGES[:-1] + _NORM_EDGES[1:]) / 2
    kinds = [_kind(float(centre), data.classes.cutoffs) for centre in centres]
    drawing = bars(
        counts,
        _NORM_EDGES,
        kinds=kinds,
        x_ticks={0.02: "a alone", 0.25: ".25", 0.5: "equal", 0.75: ".75", 0.98: "b alone"},
        labels=("relative norm", "latents (log)"),
        title="Histogram of relative decoder norms",
    )
    return figure(drawing, "Relative decoder norm: ½((‖d_b‖ − ‖d_a‖) / max + 1). Mind the log scale.")


def _kind(relative_norm: float, cuts: CutOffs) -> str:
    """The colour class of a relative norm; the default cut-offs where others cut another statistic."""
    cuts = cuts if cuts.statistic == "relative_norm" else CUTOFFS["default"]
    if relative_norm < cuts.a_only:
        return "a"
    if relative_norm > cuts.b_only:
        return "b"
    return "shared" if cuts.shared[0] < relative_norm < cuts.shared[1] else "other"


def _cosine_plot(data: ReportData) -> str:
    assert data.classes.cosine is not None
    cosine = data.classes.cosine.cpu().numpy()[data.classes.learned("shared").cpu().numpy()]
    counts = np.histogram(cosine.clip(-1, 1), _COSINE_EDGES)[0]
    drawing = bars(
        counts,
        _COSINE_EDGES,
        kinds=["shared"] * len(counts),
        x_ticks={-1.0: "−1", -0.5: "−.5", 0.0: "0", 0.5: ".5", 1.0: "1"},
        labels=("cosine of decoder rows", "latents (log)"),
        title="Histogram of cosines of shared latents",
    )
    return figure(drawing, "Shared latents: angle between what a latent writes to a and to b.")


def _density_plot(data: ReportData) -> str:
    shares: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for name, kind in _KINDS.items():
        density = data.density[data.classes.learned(name).cpu().numpy()]
        counts[name] = len(density)
        if (density > 0).any():
            found = np.histogram(np.log10(density[density > 0]).clip(-6, 0), _DENSITY_EDGES)[0]
            shares[kind] = found / found.sum()
    drawing = steps(
        shares,
        _DENSITY_EDGES,
        x_ticks={-6.0: "10⁻⁶", -5.0: "10⁻⁵", -4.0: "10⁻⁴", -3.0: "10⁻³", -2.0: "1%", -1.0: "10%", 0.0: "100%"},
        labels=("share of rows on which a latent is active", "share of the class"),
        title="Density of latents by class",
    )
    names = {kind: name for name, kind in _KINDS.items()}
    keys = "".join(f'<span class="key {kind}"></span>{names[kind]} ({counts[names[kind]]:,})' for kind in shares)
    return figure(drawing, f"Density by class:{keys}")


def _labels(data: ReportData, scores: LabelScores) -> str:
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
        _optional(best.relative_norm),
        f"{best.f1:.2f}",
        *(_auroc(by_name.get(detector)) for detector in detectors),
    ]


def _auroc(score: DetectorScore | None) -> str:
    if score is None:
        return ""
    return f'{score.auroc:.3f} <span class="range">{score.auroc_low:.2f}–{score.auroc_high:.2f}</span>'


def _named(data: ReportData) -> str:
    """Best latents of labels that are not among the most specific ones."""
    cards = "".join(data.cards[i].html(side="shared", number_of_exemplars=data.exemplars_per_card) for i in data.named)
    return section("Latents that find the planted behaviours best", cards, identity="named") if cards else ""


def _latents(data: ReportData, side: str, latents: Sequence[int]) -> str:
    name = plain(data.classes.a if side == "a" else data.classes.b)
    cards = "".join(
        data.cards[latent].html(side=side, number_of_exemplars=data.exemplars_per_card) for latent in latents
    )
    note = (
        f"The {len(latents)} live latents with the most extreme relative norms on this side, whether or not they pass "
        "a cut-off. Each line is the largest value in one context; the outlined token has it. Promoted tokens are a "
        "logit lens: what the decoder row says through the final norm and head, later layers skipped."
    )
    return section(
        f'Most specific to <span class="side-{side}">{name}</span>', cards, identity=f"most-{side}", note=note
    )


def _foot() -> str:
    from crosscoder import __version__

    return (
        f"<footer>Written by crosscoder {plain(__version__)}. Numbers are in <code>summary.json</code> and "
        "<code>latents.parquet</code> beside this file. It contains passages of the analysed text.</footer>"
    )


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
