"""Plots of interventions as SVG files of their own: rate and side effects against dose or number of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2

from crosscoder.analysis.plots import Curve, curves
from crosscoder.interventions.steering import Steering

_STYLE = """<style>
svg { font-family: system-ui, sans-serif; --a: #2f6fb3; --b: #c2571a; --shared: #3d8b5f; --other: #777; --ink: #333; }
.tick { fill: #666; font-size: 11px; text-anchor: middle; } .tick.end { text-anchor: end; }
.axis { fill: var(--ink); font-size: 12.5px; text-anchor: middle; } .grid { stroke: #ddd; stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); } .line.shared { stroke: var(--shared); }
.line.other { stroke: var(--other); stroke-dasharray: 5 3; }
.band { opacity: .16; } .band.a { fill: var(--a); } .band.b { fill: var(--b); } .band.shared { fill: var(--shared); }
.band.other { fill: var(--other); }
</style><rect width="100%" height="100%" fill="white"/>"""


def standalone(svg: str) -> str:
    """A plot of `plots` with its colours inside, to be a file of its own."""
    head, _, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{_STYLE}{rest}'


def dose_response(steering: Steering) -> dict[str, str]:
    """`rate` and `kl` against the multiple of the largest values, where at least two doses were measured."""
    doses = sorted((r for r in steering.results if r.dose.amount is not None), key=lambda r: r.dose.amount or 0.0)
    drawn: dict[str, str] = {}
    rated = [(r.dose.amount or 0.0, r.rate) for r in doses if r.rate is not None]
    if len(rated) > 1:
        rates = [rate for _, rate in rated]
        shares, low, high = ([getattr(rate, name) for rate in rates] for name in ("share", "low", "high"))
        line = Curve("b", [amount for amount, _ in rated], shares, low, high)
        drawn["rate"] = _drawn([line], f"replies in which the behaviour shows ({steering.behaviour})", top=1.0)
    aside = [(r.dose.amount or 0.0, r.side_effects.kl) for r in doses if r.side_effects is not None]
    if len(aside) > 1:
        line = Curve("other", [amount for amount, _ in aside], [kl for _, kl in aside])
        drawn["kl"] = _drawn([line], "KL (clean ‖ edited) on unrelated text, nats")
    return drawn


def against_count(lines: Mapping[str, Sequence[tuple[int, float, float, float]]], *, title: str, y_label: str) -> str:
    """Rates with intervals (number of latents, rate, low, high) on a doubling scale; keys are colour classes."""
    counts = sorted({count for points in lines.values() for count, *_ in points})
    ticks = {log2(count): f"{count:,}" for count in counts if count & (count - 1) == 0}
    drawn = [
        Curve(
            kind, [log2(p[0]) for p in points], [p[1] for p in points], [p[2] for p in points], [p[3] for p in points]
        )
        for kind, points in lines.items()
    ]
    return standalone(curves(drawn, x_ticks=ticks, labels=("latents", y_label), title=title, top=1.0))


def _drawn(lines: Sequence[Curve], title: str, *, top: float | None = None) -> str:
    amounts = sorted({amount for line in lines for amount in line.x})
    ticks = {amount: f"{amount:g}" for amount in amounts}
    labels = ("multiple of each latent's largest value", title)
    return standalone(curves(lines, x_ticks=ticks, labels=labels, title=title, top=top))
