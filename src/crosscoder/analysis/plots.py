"""Plots as inline SVG: no scripts, no fonts, colours by class so that light and dark are the style sheet's business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

import numpy as np
from jaxtyping import Float, Int

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 14, 44
TILES = 60


@dataclass(frozen=True)
class Axes:
    """Where data lie: x from `x0` to `x1`, y from `bottom` to `top`, or from 0 on a log10(1 + y) scale when `log`."""

    x0: float
    x1: float
    top: float
    log: bool = False
    bottom: float = 0.0

    def x(self, value: float) -> float:
        """The horizontal place of a value."""
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """The vertical place of a value."""
        part = (value - self.bottom) / (self.top - self.bottom)
        share = log10(1 + value) / log10(1 + self.top) if self.log else part
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def frame(self, *, x_ticks: Mapping[float, str], x_label: str, y_label: str) -> str:
        """Grid, ticks and labels."""
        parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>' for y in self._grid]
        parts += [
            _text(LEFT - 7, y + 4, label, kind="tick end") for y, label in zip(self._grid, self._labels, strict=True)
        ]
        parts += [_text(self.x(at), HEIGHT - BOTTOM + 18, label, kind="tick") for at, label in x_ticks.items()]
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, kind="axis"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'<text class="axis" transform="translate(13 {middle:.1f}) rotate(-90)">{escape(y_label)}</text>'
        return "".join([*parts, turned])

    @property
    def _ticks(self) -> list[float]:
        if self.bottom < -1:
            return [float(tick) for tick in range(ceil(self.bottom), floor(self.top) + 1)]
        if not self.log:
            return [self.bottom + (self.top - self.bottom) * part / 4 for part in range(5)]
        return [0, *(10.0**power for power in range(int(log10(max(1, self.top))) + 1))]

    @property
    def _grid(self) -> list[float]:
        return [self.y(tick) for tick in self._ticks]

    @property
    def _labels(self) -> list[str]:
        if self.log or self.top >= 8:
            return [f"{tick:,.0f}" for tick in self._ticks]
        if self.bottom < -1 or self.top > 1.2:
            return [f"{tick:.2g}" for tick in self._ticks]
        return [f"{tick:.0%}" for tick in self._ticks]


def bars(
    counts: Int[np.ndarray, "bins"],
    edges: Float[np.ndarray, "edges"],
    *,
    kinds: Sequence[str],
    x_ticks: Mapping[float, str],
    labels: tuple[str, str],
    title: str,
) -> str:
    """A histogram with log counts; `kinds` is the colour class of every bar."""
    axes = Axes(float(edges[0]), float(edges[-1]), max(1.0, float(counts.max(initial=0))), log=True)
    drawn = [
        _bar(axes, count, span=span, kind=kind)
        for count, span, kind in zip(counts.tolist(), _spans(edges), kinds, strict=True)
        if count
    ]
    frame = axes.frame(x_ticks=x_ticks, x_label=labels[0], y_label=labels[1])
    return _svg(frame + "".join(drawn), title)


def steps(
    shares: Mapping[str, Float[np.ndarray, "bins"]],
    edges: Float[np.ndarray, "edges"],
    *,
    x_ticks: Mapping[float, str],
    labels: tuple[str, str],
    title: str,
) -> str:
    """Histograms as outlines over one another, one for each colour class in `shares`."""
    top = max((float(share.max(initial=0)) for share in shares.values()), default=0.0) or 1.0
    axes = Axes(float(edges[0]), float(edges[-1]), top)
    frame = axes.frame(x_ticks=x_ticks, x_label=labels[0], y_label=labels[1])
    return _svg(frame + "".join(_outline(axes, share, edges=edges, kind=kind) for kind, share in shares.items()), title)


@dataclass(frozen=True)
class Curve:
    """A line through points `y` over `x`, with the range from `low` to `high` at each of them where there is one."""

    kind: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def curves(
    lines: Sequence[Curve],
    *,
    x_ticks: Mapping[float, str],
    labels: tuple[str, str],
    title: str,
    top: float | None = None,
) -> str:
    """Lines over one another, each with its range as a band."""
    places = [x for line in lines for x in line.x]
    heights = [y for line in lines for y in (*line.y, *line.low, *line.high)]
    bottom = floor(10 * min([0.0, *heights])) / 10
    axes = Axes(min(places), max(max(places), min(places) + 1e-9), _top(heights) if top is None else top, bottom=bottom)
    frame = axes.frame(x_ticks=x_ticks, x_label=labels[0], y_label=labels[1])
    return _svg(
        frame + "".join(_band(axes, line) for line in lines) + "".join(_line(axes, line) for line in lines), title
    )


def tiles(
    x: Float[np.ndarray, "points"],
    y: Float[np.ndarray, "points"],
    *,
    span: tuple[float, float],
    kinds: Sequence[str],
    cuts: tuple[float | None, float | None],
    labels: tuple[str, str],
    title: str,
) -> str:
    """Where points lie in a square from `span[0]` to `span[1]`: darker where there are more, coloured by most of them.

    Points outside are drawn at the edge. `cuts` are lines at one x and one y.
    """
    axes = Axes(*span, span[1], bottom=span[0])
    ticks = {
        span[0] + (span[1] - span[0]) * part / 4: f"{span[0] + (span[1] - span[0]) * part / 4:.2g}" for part in range(5)
    }
    frame = axes.frame(x_ticks=ticks, x_label=labels[0], y_label=labels[1])
    return _svg(frame + "".join(_tiles(axes, x, y, kinds=kinds)) + _cut_lines(axes, cuts), title)


def dial(value: float, *, title: str) -> str:
    """A line from a to b with a dot at `value` between 0 and 1."""
    return (
        f'<svg class="dial" viewBox="0 0 120 16" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        '<line class="rail-a" x1="6" x2="60" y1="8" y2="8"/><line class="rail-b" x1="60" x2="114" y1="8" y2="8"/>'
        f'<line class="grid" x1="60" x2="60" y1="3" y2="13"/><circle cx="{6 + 108 * value:.1f}" cy="8" r="5"/></svg>'
    )


def _bar(axes: Axes, count: int, *, span: tuple[float, float], kind: str) -> str:
    left, right, top = axes.x(span[0]), axes.x(span[1]), axes.y(count)
    shape = f'x="{left + 0.5:.1f}" width="{max(0.5, right - left - 1):.1f}" y="{top:.1f}"'
    title = f"<title>{span[0]:.2f} to {span[1]:.2f}: {count:,} latents</title>"
    return f'<rect class="fill {kind}" {shape} height="{HEIGHT - BOTTOM - top:.1f}">{title}</rect>'


def _top(heights: Sequence[float]) -> float:
    """Where a drawing of these heights ends: at the highest, and above its bottom where all are 0."""
    return max([1e-9, *heights]) if min([0.0, *heights]) == 0 else max([0.0, *heights])


def _band(axes: Axes, line: Curve) -> str:
    if not line.low:
        return ""
    there = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(line.x, line.high, strict=True)]
    back = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(line.x, line.low, strict=True)][::-1]
    return f'<polygon class="band {line.kind}" points="{" ".join([*there, *back])}"/>'


def _line(axes: Axes, line: Curve) -> str:
    corners = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True)]
    return f'<polyline class="line {line.kind}" points="{" ".join(corners)}"/>'


def _tiles(
    axes: Axes, x: Float[np.ndarray, "points"], y: Float[np.ndarray, "points"], *, kinds: Sequence[str]
) -> Iterator[str]:
    """One square for every cell that holds points; its opacity is one of eight classes, by the log of the count."""
    edges = np.linspace(axes.x0, axes.x1, TILES + 1)
    corner: list[float] = edges.tolist()
    column, row = (np.clip(np.digitize(values, edges) - 1, 0, TILES - 1) for values in (x, y))
    names = list(dict.fromkeys(kinds))
    of_kind = np.array([names.index(kind) for kind in kinds], dtype=np.int64)
    counts = np.zeros((TILES, TILES, max(1, len(names))), dtype=np.int64)
    np.add.at(counts, (column, row, of_kind), 1)
    most = log10(1 + counts.sum(2).max(initial=1))
    width, height = axes.x(corner[1]) - axes.x(corner[0]), axes.y(corner[0]) - axes.y(corner[1])
    for i, j in zip(*counts.sum(2).nonzero(), strict=True):
        count = int(counts[i, j].sum())
        level = max(1, round(8 * log10(1 + count) / most))
        place = f'x="{axes.x(corner[i]):.1f}" y="{axes.y(corner[j + 1]):.1f}" width="{width:.1f}" height="{height:.1f}"'
        kind = names[int(counts[i, j].argmax())]
        yield f'<rect class="tile t{level} fill {kind}" {place}><title>{count:,} latents</title></rect>'


def _cut_lines(axes: Axes, cuts: tuple[float | None, float | None]) -> str:
    x, y = cuts
    left, right, low, high = axes.x(axes.x0), axes.x(axes.x1), axes.y(axes.bottom), axes.y(axes.top)
    across = (
        ""
        if y is None
        else f'<line class="cut" x1="{left:.1f}" x2="{right:.1f}" y1="{axes.y(y):.1f}" y2="{axes.y(y):.1f}"/>'
    )
    up = (
        ""
        if x is None
        else f'<line class="cut" x1="{axes.x(x):.1f}" x2="{axes.x(x):.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    )
    return across + up


def _outline(axes: Axes, share: Float[np.ndarray, "bins"], *, edges: Float[np.ndarray, "edges"], kind: str) -> str:
    corners = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for y, span in zip(share, _spans(edges), strict=True) for x in span]
    return f'<polyline class="line {kind}" points="{" ".join(corners)}"/>'


def _spans(edges: Float[np.ndarray, "edges"]) -> Iterator[tuple[float, float]]:
    return zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def _text(x: float, y: float, text: str, *, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(content: str, title: str) -> str:
    name = escape(title)
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
    return f"{head}<title>{name}</title>{content}</svg>"
