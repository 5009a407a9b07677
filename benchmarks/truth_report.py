"""The report of the ground-truth benchmark: verdicts, a table for every arena, null worlds, initialisation, plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from truth_cells import ARCHITECTURES, SPARSITIES, arenas
from truth_findings import FINDINGS, SECOND_SEEDS, Cells, judge

from crosscoder.analysis import plots
from crosscoder.synthetic import recall_by_frequency
from crosscoder.training.json_numbers import json_text

CALIBRATION_SEEDS = (0, 1, 2)
NOMINAL = 0.02
"""Share of null latents that a calibrated band leaves out, half on either side."""
EDGES = (0.002, 0.003, 0.0045, 0.0065, 0.01, 0.0141, 0.02)
COLOURS = ("#b3500c", "#17698a", "#6b7d2a", "#7a3f8c", "#857f73", "#c08a00")
SHOWN = ("plain l1", "plain topk", "plain batchtopk", "plain jumprelu", "designated l1", "dedicated batchtopk")
"""Kinds of cells in the plots of the tight arena."""
COLUMNS: dict[str, tuple[str, str]] = {
    "FVE": ("fve", ".3f"),
    "L0": ("l0", ".1f"),
    "dead": ("dead_fraction", ".0%"),
    "MCC": ("mcc", ".2f"),
    "recall": ("recall", ".2f"),
    "matched": ("matched_recall", ".2f"),
    "precision": ("precision", ".2f"),
    "called": ("num_called", ".0f"),
    "false-exclusive": ("false_exclusive_rate", ".1%"),
    "shrunk /100": ("shrunk_per_100", ".2f"),
    "decoupled /100": ("decoupled_per_100", ".2f"),
}
NOTES = """\
Each seed has its own world, rows and initial weights. Intervals are Student's t over seeds, 95 %. In the tables: mean
over seeds ± standard deviation; cuts of dedicated-feature crosscoders (share 0.2 / 0.8, cosine 0.83) unless said.
*recall*: exclusive concepts with a live latent that is called exclusive to their model and matches; *matched*: some
live latent matches, whatever its norms say; *false-exclusive*: live latents called exclusive that match no exclusive
concept; *shrunk*, *decoupled*: per 100 shared concepts; *density ratio*: median density of latents called exclusive
over that of the others, beside the same of the concepts' frequencies. A difference-SAE has no norms: all its live
latents count as called. Sizes, learning rates and coefficients were chosen on seed 1000, which is in no table; that
exploration came before the registration and showed roughly where findings 1, 2, 4 and 5a would fall. Penalised codes
have the FVE of TopK there, not its L0: ReLU codes have a tail of small values that grows with the dictionary. The arena
null-crowded was added when the other null worlds turned out to be easy."""

RULE = """\
Registered in `benchmarks/truth_findings.py` before the cells existed. *confirmed*: the whole interval is beyond the
registered effect; *refuted*: the whole interval is on its other side; *inconclusive*: neither, or fewer than three
seeds in which the number is defined. Ratios are means of logarithms. *Again* is a second round, registered after the
first and run on fresh seeds, which are in no other table."""


@dataclass(frozen=True)
class Kind:
    """Cells that differ by their seed alone."""

    arena: str
    architecture: str
    sparsity: str
    across: str

    @property
    def label(self) -> str:
        """As the tables name it."""
        return f"{self.architecture} {self.sparsity}" + ("" if self.across == "same" else f", {self.across}")


Groups = Mapping[Kind, Sequence[Mapping[str, Any]]]


def write(cells: Cells, facts: Mapping[str, Any], out: Path) -> str:
    """Write `truth.md`, `truth.json` and the plots into `out`; gives the report."""
    groups = grouped(cells)
    verdicts = [judge(finding, cells) for finding in FINDINGS]
    drawn = figures(groups)
    for name, svg in drawn.items():
        (out / f"truth-{name}.svg").write_text(svg, encoding="utf-8")
    lines = [f"# Which crosscoder to trust, where the truth is known, {facts['date']}", ""]
    lines += [" · ".join(f"{name} {value}" for name, value in facts.items() if name != "date"), "", NOTES, ""]
    if facts["quick"]:
        lines += ["**A quick run: it shows that everything runs. No number or verdict below means anything.**", ""]
    lines += ["## Registered findings", "", RULE, "", *findings_lines([v.to_json() for v in verdicts])]
    for arena in dict.fromkeys(kind.arena for kind in groups):
        lines += ["", f"## Arena: {arena}", "", *arena_lines(groups, arena)]
    lines += ["", "## Density and pressure", "", *pressure_lines(groups)]
    lines += ["", "## Null worlds: what is called exclusive where nothing is", "", *null_lines(groups)]
    lines += ["", "## Initialisation: same or independent across sources", "", *initialisation_lines(groups)]
    lines += ["", *(f"![{name}](truth-{name}.svg)\n" for name in drawn)]
    report = "\n".join(lines).rstrip() + "\n"
    (out / "truth.md").write_text(report, encoding="utf-8")
    short = {name: {k: v for k, v in cell.items() if k not in ("shares", "curve")} for name, cell in cells.items()}
    short = {name: _rounded(cell) for name, cell in short.items()}
    content = {"format": "crosscoder.truth/1", "about": facts, "cells": short}
    content |= {"findings": [verdict.to_json() for verdict in verdicts]}
    text = json_text(content).replace('}, "', '},\n"')
    (out / "truth.json").write_text(text + "\n", encoding="utf-8")
    return report


def _rounded(content: Any) -> Any:
    """Numbers to four significant digits, which is more than seeds agree on."""
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    return float(f"{content:.4g}") if isinstance(content, float) else content


def grouped(cells: Cells) -> Groups:
    """Cells of the first round by kind, in the order of arenas, architectures and sparsities."""
    groups: dict[Kind, list[Mapping[str, Any]]] = {}
    first_round = (cell for cell in cells.values() if cell["seed"] not in SECOND_SEEDS)
    for cell in sorted(first_round, key=_place):
        sparsity = cell["sparsity"] + ("" if cell["pressure"] == 1 else f"x{cell['pressure']:g}")
        kind = Kind(cell["arena"], cell["architecture"], sparsity, cell["across"])
        groups.setdefault(kind, []).append(cell)
    return groups


def _place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    architecture, sparsity = ARCHITECTURES.index(cell["architecture"]), SPARSITIES.index(cell["sparsity"])
    arena = list(arenas()).index(cell["arena"])
    return arena, cell["across"] != "same", architecture, sparsity, cell["pressure"], cell["seed"]


def findings_lines(verdicts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The table of verdicts."""
    yield "| finding | claim | source | registered | found [95 %] | seeds | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for v in verdicts:
        found = f"{v['mean']:.3g} [{v['low']:.3g}, {v['high']:.3g}]"
        seeds = f"{v['num_defined']}/{len(v['seeds'])}"
        registered = f"{v['direction']} {v['effect']:g}"
        cells = (v["name"], v["claim"], v["source"], registered, found, seeds, f"**{v['verdict']}**")
        yield "| " + " | ".join(cells) + " |"


def arena_lines(groups: Groups, arena: str) -> Iterator[str]:
    """One row per kind of cell."""
    yield "| crosscoder | " + " | ".join(COLUMNS) + " | density ratio (true) |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for kind, members in groups.items():
        if kind.arena != arena:
            continue
        shown = [spread(values(members, field), form) for field, form in COLUMNS.values()]
        ratio = spread(values(members, "density_ratio"), ".2f")
        true = spread(values(members, "true_density_ratio"), ".2f")
        yield f"| {kind.label} | " + " | ".join(shown) + f" | {ratio} ({true}) |"


def pressure_lines(groups: Groups) -> Iterator[str]:
    """L1 under more pressure than the tuned coefficient; not registered."""
    yield (
        "Not registered: the median density of exclusive over that of other latents (share 0.05 / 0.95) under more L1."
    )
    yield ""
    yield "| arena | crosscoder | coefficient × | FVE | L0 | exclusive latents | density ratio | recall |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind, members in groups.items():
        penalised = kind.sparsity.startswith("l1") and kind.architecture in ("plain", "designated")
        if not penalised or kind.across != "same" or kind.arena not in ("overcomplete", "tight"):
            continue
        cells = [spread(values(members, field), form) for field, form in (("fve", ".3f"), ("l0", ".1f"))]
        fields = (("num_called", ".0f"), ("density_ratio", ".2f"), ("recall", ".2f"))
        cells += [spread(values(members, field, "anthropic"), form) for field, form in fields]
        factor = kind.sparsity.partition("x")[2] or "1"
        yield f"| {kind.arena} | {kind.architecture} | {factor} | " + " | ".join(cells) + " |"


def null_lines(groups: Groups) -> Iterator[str]:
    """False-exclusive rates at published cuts, and beyond bands that some seeds calibrate and others test."""
    yield (
        f"Calibrated: the band that holds {1 - NOMINAL:.0%} of the live latents of seeds "
        f"{', '.join(map(str, CALIBRATION_SEEDS))}; tested on the other seeds, where {NOMINAL:.0%} should lie beyond. "
        "The norms of dedicated latents are 0 and 1 by their wiring: no band can tell anything of them."
    )
    yield ""
    yield "| world | crosscoder | 0.2 / 0.8 | 0.05 / 0.95 | relative norm 0.1 / 0.9 | band of shares | beyond, tested |"
    yield "|---|---|---|---|---|---|---|"
    for kind, members in groups.items():
        if not kind.arena.startswith("null"):
            continue
        rates = [spread(values(members, "false_exclusive_rate", cut), ".1%") for cut in ("dfc", "anthropic", "minder")]
        low, high, beyond = calibrated(members)
        band = ["–", "–"] if kind.architecture == "dedicated" else [f"{low:.4f} to {high:.4f}", f"{beyond:.1%}"]
        cells = [kind.arena, kind.label, *rates, *band]
        yield "| " + " | ".join(cells) + " |"


def calibrated(members: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """The band of the calibration seeds, and the mean fraction of the other seeds' latents beyond it."""
    fitted = [value for m in members if m["seed"] in CALIBRATION_SEEDS for value in m["shares"]]
    low, high = np.quantile(fitted, [NOMINAL / 2, 1 - NOMINAL / 2]) if fitted else (np.nan, np.nan)
    tested = [np.array(m["shares"]) for m in members if m["seed"] not in CALIBRATION_SEEDS and m["shares"]]
    rates = [float(((shares < low) | (shares > high)).mean()) for shares in tested]
    return float(low), float(high), mean(rates) if rates else float("nan")


def initialisation_lines(groups: Groups) -> Iterator[str]:
    """Same against independent, wherever both were trained."""
    yield "Spread: standard deviation of the share `n_b / (n_a + n_b)` over live latents."
    yield ""
    yield "| arena | crosscoder | init | FVE | dead | MCC | spread | false-exclusive | recall |"
    yield "|---|---|---|---|---|---|---|---|---|"
    both = {(k.arena, k.architecture, k.sparsity) for k in groups if k.across == "independent"}
    for kind, members in groups.items():
        if (kind.arena, kind.architecture, kind.sparsity) in both:
            forms = (("fve", ".4f"), ("dead_fraction", ".1%"), ("mcc", ".3f"), ("share_sd", ".4f"))
            cells = [spread(values(members, field), form) for field, form in forms]
            cells += [spread(values(members, "false_exclusive_rate"), ".2%"), spread(values(members, "recall"), ".3f")]
            yield f"| {kind.arena} | {kind.architecture} {kind.sparsity} | {kind.across} | " + " | ".join(cells) + " |"


def values(members: Sequence[Mapping[str, Any]], field: str, cut: str = "dfc") -> list[float]:
    """A number of every seed, as far as it is defined."""
    found = [m.get(field, (m["cuts"].get(cut) or m["cuts"].get("difference") or {}).get(field)) for m in members]
    return [float(value) for value in found if value is not None and isfinite(value)]


def spread(numbers: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, or a dash for nothing."""
    if not numbers:
        return "–"
    deviation = f" ± {stdev(numbers):{form}}" if len(numbers) > 1 else ""
    return f"{mean(numbers):{form}}{deviation}"


def figures(groups: Groups) -> dict[str, str]:
    """Plots by name."""
    chosen = {
        "shares-null": [k for k in groups if k.arena == "null-crowded" and k.sparsity in ("l1", "batchtopk")],
        "shares-tight": [k for k in groups if k.arena == "tight" and k.label in SHOWN],
    }
    drawn = {name: _shares(groups, kinds, name) for name, kinds in chosen.items() if kinds}
    curves = [k for k in groups if k.arena == "tight" and k.across == "same" and k.architecture != "difference"]
    shown = [k for k in curves if k.label in SHOWN]
    return drawn | ({"power": _power(groups, shown)} if shown else {})


def _shares(groups: Groups, kinds: Sequence[Kind], name: str) -> str:
    edges = np.linspace(0, 1, 51)
    axes = plots.Axes(0.0, 1.0, 1.0)
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind in kinds:
        shares = np.array([value for m in groups[kind] for value in m.get("shares", ())])
        if len(shares):
            cumulative = [(float(edge), float((shares <= edge).mean())) for edge in edges]
            lines[kind.label] = cumulative
    ticks = {0.0: "base alone", 0.5: "both alike", 1.0: "chat alone"}
    return _lines(axes, lines, x_ticks=ticks, labels=("share of the norm", "live latents up to it"), title=name)


def _power(groups: Groups, kinds: Sequence[Kind]) -> str:
    axes = plots.Axes(log10(EDGES[0]), log10(EDGES[-1]), 1.0)
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind in kinds:
        pairs = [pair for m in groups[kind] for pair in m["curve"]["dfc"]]
        frequency, found = torch.tensor([p for p, _ in pairs]), torch.tensor([hit for _, hit in pairs])
        curve = recall_by_frequency(found.bool(), frequency, edges=EDGES)
        middles = [log10(low * high) / 2 for low, high in zip(EDGES, EDGES[1:], strict=False)]
        lines[kind.label] = [(x, y) for x, y in zip(middles, curve.recall, strict=True) if isfinite(y)]
    ticks = {log10(p): f"{p:.1%}" for p in (0.002, 0.005, 0.01, 0.02)}
    title = "recall of exclusive concepts by frequency, tight"
    return _lines(axes, lines, x_ticks=ticks, labels=("frequency of the concept", "recall"), title=title)


def _lines(
    axes: plots.Axes,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_ticks: Mapping[float, str],
    labels: tuple[str, str],
    title: str,
) -> str:
    """Lines with a legend, as a file that needs no style sheet."""
    place: Callable[[tuple[float, float]], str] = lambda point: f"{axes.x(point[0]):.1f},{axes.y(point[1]):.1f}"  # noqa: E731
    drawn = [
        f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.6" '
        f'points="{" ".join(map(place, points))}"/>'
        for i, points in enumerate(lines.values())
    ]
    legend = [
        f'<text x="{plots.WIDTH + 8}" y="{30 + 16 * i}" style="fill:{COLOURS[i % len(COLOURS)]}">{label}</text>'
        for i, label in enumerate(lines)
    ]
    style = (
        "<style>text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.end{text-anchor:end}"
        ".tick,.axis{text-anchor:middle}.tick.end{text-anchor:end}</style>"
    )
    frame = axes.frame(x_ticks=x_ticks, x_label=labels[0], y_label=labels[1])
    size = f'viewBox="0 0 {plots.WIDTH + 190} {plots.HEIGHT}" width="{plots.WIDTH + 190}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>{title}</title>{style}'
        f'<rect width="100%" height="100%" fill="#fff"/>{frame}{"".join(drawn)}{"".join(legend)}</svg>\n'
    )
