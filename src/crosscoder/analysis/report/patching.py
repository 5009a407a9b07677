"""Do these latents carry the difference? What b predicts when their difference is added to a's activations."""

from __future__ import annotations

from math import log10

from crosscoder.analysis.diff_cards import Unmeasured
from crosscoder.analysis.markup import figure, plain, section, table
from crosscoder.analysis.plots import Curve, curves
from crosscoder.analysis.report.data import ReportData
from crosscoder.interventions.patching_curves import Condition, Estimate, PatchingCurves

_TITLE = "Do these latents carry the difference?"
_KINDS = {"norm": "other", "scaling": "shared", "joint": "b", "random": "a"}
_ROWS = (
    ("a's activations in b", Condition("reference", "none")),
    ("all latents", Condition("reference", "latents")),
    ("the whole reconstruction", Condition("reference", "reconstruction")),
    ("only the error", Condition("reference", "error")),
    ("b's activations at template tokens only", Condition("tokens", "template")),
)


def patching(data: ReportData) -> str:
    """The section; where patching was not run it says why."""
    found = data.patching
    if isinstance(found, Unmeasured):
        return section(_TITLE, f"<p>Not measured: {plain(found.reason)}</p>", identity="patching")
    groups = _groups(found)
    head = ["what is put back", *[plain(group) for group in groups]]
    rows = [[plain(name), *[_cell(found, condition, group) for group in groups]] for name, condition in _ROWS]
    rows += [
        [f"top against bottom half by {plain(name)}", *[_half(found, name, g) for g in groups]]
        for name in _halves(found)
    ]
    note = (
        f"b's later layers run on a's activations, and the difference of some latents is added back. Cells are KL to "
        f"b's own predictions in nats, and the share of the gap that is closed, with 95% intervals over "
        f"{found.num_documents:,} documents. A ranking that means something closes the gap with fewer latents than "
        "random ones, and its top half with more than its bottom half."
    )
    drawn = "".join(
        figure(_curves(found, group), f"Share of the gap closed, {plain(group)}:{_keys(found)}")
        for group in (groups[:2] if found.names else ())
    )
    return section(
        _TITLE,
        table(head, rows),
        f'<div class="figures">{drawn}</div>',
        identity="patching",
        note=note,
    )


def _groups(found: PatchingCurves) -> list[str]:
    """All tokens, responses, their first ones, and template tokens: those of them that there are."""
    shown = [group for group in found.groups if group in ("all", "response", "template") or group.startswith("first")]
    return [group for group in shown if int(found.num_tokens[found.groups.index(group)])]


def _cell(found: PatchingCurves, condition: Condition, group: str) -> str:
    kl = found.divergence(condition, group=group)
    if condition.name == "none":
        return f"{kl.value:.3f}"
    return f"{kl.value:.3f} <b>{_share(found.share_recovered(condition, group=group))}</b>"


def _half(found: PatchingCurves, name: str, group: str) -> str:
    difference = found.halves(name, group=group)
    return f"{difference.value:+.0%} {_range(difference)}"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} {_range(estimate)}"


def _range(estimate: Estimate) -> str:
    return f'<span class="range">{estimate.low:.0%} to {estimate.high:.0%}</span>'


def _halves(found: PatchingCurves) -> list[str]:
    return list(dict.fromkeys(c.name for c in found.conditions if c.kind == "top half"))


def _curves(found: PatchingCurves, group: str) -> str:
    lines = [_line(found, name, group) for name in found.names]
    places = sorted({x for line in lines for x in line.x})
    return curves(
        lines,
        x_ticks={x: f"{round(10**x):,}" for x in places},
        labels=("number of latents (log)", "share of the gap closed"),
        title=f"Share of the gap closed, {group}",
    )


def _line(found: PatchingCurves, name: str, group: str) -> Curve:
    points = found.curve(name, group=group)
    x, y = [log10(size) for size, _ in points], [estimate.value for _, estimate in points]
    low, high = [estimate.low for _, estimate in points], [estimate.high for _, estimate in points]
    return Curve(_KINDS.get(name, "other"), x, y, low, high)


def _keys(found: PatchingCurves) -> str:
    return "".join(f'<span class="key {_KINDS.get(name, "other")}"></span>{plain(name)}' for name in found.names)
