"""The report of `layers.py`: verdicts, curves, the table of all cells; Markdown beside two SVG files."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import isfinite, log10
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from layers_findings import FINDINGS, Cells, MoreVariance, Verdict, decide

import crosscoder
from crosscoder.training.json_numbers import json_text

NOTE = (
    "Ratios at equal held-out loss (reconstruction + L1 of norms at one coefficient), interpolated between sizes; "
    "`along the curve` from the highest to the lowest loss that both reach. The findings and the rule were registered "
    "before the runs in `layers_findings.py`. A seed decides the documents, their order and the initial weights."
)
COLOURS = {"acausal": "#0b7285", "weakly-causal": "#e67700", "per-layer": "#862e9c"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 300, 58, 16, 30, 46
CELL_COLUMNS = ("sparsity", "wiring", "size", "num_latents", "MFLOP per row", "loss", "FVE", "L0", "dead", "seconds")


def write_report(cells: Cells, settings: Mapping[str, Any], out: Path, *, seeds: Sequence[int]) -> str:
    """Decide, draw, write into `out`, and give the text."""
    verdicts = [decide(finding, cells, seeds) for finding in FINDINGS]
    date = datetime.date.today().isoformat()
    plots = {"latents": "num_latents", "flops": "flops_per_row"}
    for name, size in plots.items():
        label = "latents in total" if name == "latents" else "training FLOPs per row"
        (out / f"layers-{name}.svg").write_text(plot(cells, size, label=label), encoding="utf-8")
    about = {
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cells": len(cells),
        "hours of training": round(sum(cell["seconds"] for cell in cells) / 3600, 2),
        **settings,
    }
    lines = [f"# Dictionaries across layers, {date}", "", " · ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += ["## Registered findings", "", NOTE, "", *verdict_lines(verdicts), ""]
    lines += [f"![held-out loss against {name}](layers-{name}.svg)\n" for name in plots]
    lines += ["## All cells", "", "Means over seeds; loss and L0 are sums over the layers, on held-out rows.", ""]
    lines += [_row(CELL_COLUMNS), _row(["---"] * len(CELL_COLUMNS)), *cell_lines(cells)]
    text = "\n".join(lines) + "\n"
    (out / "layers.md").write_text(text, encoding="utf-8")
    content = {"format": "crosscoder.benchmark/1", "about": about, "cells": list(cells)}
    (out / "layers.json").write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
    return text


def verdict_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The table of findings."""
    head = ("finding", "published", "counts as confirmed", "found", "95 % interval", "each seed", "along the curve")
    yield _row([*head, "verdict"])
    yield _row(["---"] * (len(head) + 1))
    for v in verdicts:
        sign = "" if isinstance(v.finding.measure, MoreVariance) else "×"
        digits = 3 if not sign else 2

        def number(value: float, sign: str = sign, digits: int = digits) -> str:
            return f"{value:.{digits}f}{sign}" if isfinite(value) else "–"

        interval = "–" if v.interval is None else f"{number(v.interval[0])} to {number(v.interval[1])}"
        each = (
            ", ".join(number(value) for value in v.per_seed)
            or "none: curves that do not overlap, or cells that are missing"
        )
        along = "" if v.ends is None else f"{number(v.ends[0])} to {number(v.ends[1])}"
        effect = f"more than {number(v.finding.effect)}"
        numbers = (effect, number(v.middle), interval, each, along)
        yield _row([v.finding.claim, v.finding.published, *numbers, f"**{v.word}**"])


def cell_lines(cells: Cells) -> Iterator[str]:
    """One row for every dictionary, seeds averaged."""
    kinds = dict.fromkeys((c["sparsity"], c["wiring"], c["size"]) for c in cells)
    for kind in kinds:
        group = [c for c in cells if (c["sparsity"], c["wiring"], c["size"]) == kind]
        average = {name: mean(c[name] for c in group) for name in ("loss", "fve", "l0", "dead_fraction", "seconds")}
        yield _row(
            [
                *kind,
                f"{group[0]['num_latents']:,}",
                f"{group[0]['flops_per_row'] / 1e6:.1f}",
                f"{average['loss']:.1f}" if kind[0] == "l1" else "",
                f"{average['fve']:.4f}",
                f"{average['l0']:.1f}",
                f"{average['dead_fraction']:.1%}",
                f"{average['seconds']:.0f}",
            ]
        )


def plot(cells: Cells, size: str, *, label: str) -> str:
    """Held-out loss under L1 against a size (log scale), a line for every wiring and seed."""
    shown = [c for c in cells if c["sparsity"] == "l1"]
    if not shown:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>\n'
    xs, ys = [log10(c[size]) for c in shown], [c["loss"] for c in shown]
    place = _Place(min(xs) - 0.05, max(xs) + 0.05, min(ys) * 0.97, max(ys) * 1.02)
    parts = [*_axes(place, label), *_legend()]
    for wiring, colour in COLOURS.items():
        for seed in sorted({c["seed"] for c in shown}):
            own = sorted((log10(c[size]), c["loss"]) for c in shown if (c["wiring"], c["seed"]) == (wiring, seed))
            points = [f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in own]
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(points)}"/>')
            parts += [
                f'<circle r="2.5" fill="{colour}" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}"/>' for p in points
            ]
    font = 'font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
    return f'{head}<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'


class _Place:
    """Where data lie in the drawing."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        self.x0, self.x1, self.y0, self.y1 = x0, x1, y0, y1

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _axes(place: _Place, label: str) -> Iterator[str]:
    for step in range(5):
        value = place.y0 + (place.y1 - place.y0) * step / 4
        y = place.y(value)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.0f}</text>'
    for tick in (a * 10.0**power for power in range(1, 10) for a in (1, 2, 5)):
        if place.x0 <= log10(tick) <= place.x1:
            name = f"{tick:,.0f}" if tick < 1e6 else f"{tick / 1e6:,.0f} M"
            yield f'<text x="{place.x(log10(tick)):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{name}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">held-out loss</text>'


def _legend() -> Iterator[str]:
    for place, (wiring, colour) in enumerate(COLOURS.items()):
        x = LEFT + 125 * place
        yield f'<circle r="4" fill="{colour}" cx="{x}" cy="14"/><text x="{x + 8}" y="18">{wiring}</text>'


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
