"""Plots of the step benchmark, as files that need no style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, TOP, ROW = 640, 170, 60, 34, 20
COLOURS = ("#0b7285", "#e67700", "#862e9c", "#5c940d", "#c92a2a", "#1864ab", "#a61e4d", "#495057", "#bfae9b")
OURS, OTHERS, INEXACT = "#0b7285", "#adb5bd", "#ced4da"
MOST_PHASES = 8


def ratio_bars(contenders: Mapping[str, Mapping[str, Any]], *, title: str) -> str:
    """Time over ours, one bar per contender from fast to slow, with a line over the spread of its rounds."""
    ordered = sorted(contenders.items(), key=lambda item: item[1]["ratio"])
    top = max(numbers["ratio_high"] for _, numbers in ordered) * 1.02
    scale = (WIDTH - LEFT - RIGHT) / top
    parts = [f'<text x="{LEFT}" y="18">{escape(title)}</text>']
    for tick in range(int(top) + 1):
        x, bottom = LEFT + tick * scale, TOP + ROW * len(ordered)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e9ecef"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick}×</text>')
    for place, (name, numbers) in enumerate(ordered):
        y = TOP + ROW * place
        colour = OURS if name.startswith("ours") else INEXACT if "inexact" in name else OTHERS
        low, high = (LEFT + numbers[end] * scale for end in ("ratio_low", "ratio_high"))
        parts += [
            f'<text x="{LEFT - 6}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y + 3}" width="{numbers["ratio"] * scale:.1f}" height="14" fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 10}" y2="{y + 10}" stroke="#212529" stroke-width="1.5"/>',
            f'<text x="{high + 5:.1f}" y="{y + 14}">{numbers["ratio"]:.2f}</text>',
        ]
    return _svg(parts, height=TOP + ROW * len(ordered) + 24, title=title)


def stacked_phases(by_size: Mapping[str, Mapping[str, float]], *, title: str) -> str:
    """Shares of a step by function, one stacked bar per size; the longest functions of all sizes have colours."""
    shares = {name: _shares(phases) for name, phases in by_size.items()}
    total = {phase: sum(own.get(phase, 0.0) for own in shares.values()) for own in shares.values() for phase in own}
    shown = sorted(total, key=lambda phase: -total[phase])[:MOST_PHASES]
    scale, parts = WIDTH - LEFT - RIGHT, [f'<text x="{LEFT}" y="18">{escape(title)}</text>']
    for place, (name, own) in enumerate(shares.items()):
        y, x = TOP + ROW * place, float(LEFT)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for colour, phase in zip(COLOURS, [*shown, "others"], strict=False):
            share = own.get(phase, 0.0) if phase in shown else 1 - sum(own.get(known, 0.0) for known in shown)
            width = max(0.0, share) * scale
            hint = f"<title>{escape(phase)}: {share:.0%}</title>"
            parts.append(f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="16" fill="{colour}">{hint}</rect>')
            x += width
    bottom = TOP + ROW * len(shares) + 6
    parts += _legend([*shown, "others"], bottom)
    return _svg(parts, height=bottom + 16 * (len(shown) + 1) + 8, title=title)


def _shares(phases: Mapping[str, float]) -> dict[str, float]:
    whole = sum(phases.values()) or 1.0
    return {phase: milliseconds / whole for phase, milliseconds in phases.items()}


def _legend(names: Sequence[str], top: int) -> list[str]:
    return [
        f'<rect x="{LEFT}" y="{top + 16 * i}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{LEFT + 16}" y="{top + 16 * i + 10}">{escape(name)}</text>'
        for i, (colour, name) in enumerate(zip(COLOURS, names, strict=False))
    ]


def _svg(parts: Sequence[str], *, height: int, title: str) -> str:
    font = 'font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" {font}>'
    background = f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    return f"{head}<title>{escape(title)}</title>{background}{''.join(parts)}</svg>\n"
