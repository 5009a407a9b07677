"""The report of a diff: one HTML file that loads nothing, runs nothing, and says what it does not know.

It reads as a short paper: what was compared and how far the controls go, how good the dictionary is, the controls, the
classes, then the latents that survive, with their contexts, and how every number was computed.
"""

from __future__ import annotations

from crosscoder.analysis.markup import page, plain
from crosscoder.analysis.report.controls import controls, warning
from crosscoder.analysis.report.data import ReportData
from crosscoder.analysis.report.labels import labels
from crosscoder.analysis.report.latents import changed, fixed, latents, named
from crosscoder.analysis.report.methods import methods
from crosscoder.analysis.report.norms import norms
from crosscoder.analysis.report.numbers import numbers
from crosscoder.analysis.report.patching import patching
from crosscoder.analysis.report.scaling import changes, scaling


def report(data: ReportData) -> str:
    """The whole page as HTML."""
    parts = [numbers(data), controls(data), norms(data), scaling(data), changes(data), patching(data)]
    parts += [labels(data, data.labels)] if data.labels is not None else []
    parts += [latents(data, "b"), latents(data, "a"), fixed(data), named(data), changed(data), methods()]
    title = f"{data.classes.a} and {data.classes.b}: what differs"
    return page(title, f"{_head(data)}<main>{''.join(parts)}</main>{_foot()}")


def _head(data: ReportData) -> str:
    a, b = plain(data.classes.a), plain(data.classes.b)
    facts = "".join(f"<dt>{plain(name)}</dt><dd>{plain(value)}</dd>" for name, value in data.facts.items())
    return (
        '<header class="top"><p class="kicker">Crosscoder diff</p>'
        f'<h1><span class="a">{a}</span><span class="versus"> against </span><span class="b">{b}</span></h1>'
        f'<p class="lead">{_found(data)} {_summary(data)}</p>{warning(data)}<dl class="facts">{facts}</dl></header>'
    )


def _found(data: ReportData) -> str:
    """What survives, in a sentence, where there are controls."""
    beyond = {side: found for side, found in data.most.items() if found.calibrated is not None}
    parts = [
        f'{_counted(len(found.latents))} specific to <span class="side-{side}">{side}</span> '
        f"({found.calibrated.by_chance})"
        for side, found in sorted(beyond.items(), reverse=True)
        if found.calibrated is not None
    ]
    return f"Beyond cut-offs that null crosscoders set, {' and '.join(parts)}." if parts else ""


def _counted(number: int) -> str:
    return f"{number:,} {'latent is' if number == 1 else 'latents are'}"


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


def _foot() -> str:
    from crosscoder import __version__

    return (
        f"<footer>Written by crosscoder {plain(__version__)}. Numbers are in <code>summary.json</code> and "
        "<code>latents.parquet</code> beside this file. It contains passages of the analysed text.</footer>"
    )
