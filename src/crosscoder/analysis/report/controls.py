"""Controls first: what a null says at the cut-offs that the real pair is read with, and whether it was tested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from crosscoder.analysis.calibrated import NUM_BINS, Found
from crosscoder.analysis.markup import figure, plain, section, table, visible
from crosscoder.analysis.pair_controls import CalibratedScore, ControlResult, PairControls, Stability
from crosscoder.analysis.plots import Curve, curves
from crosscoder.analysis.report.data import ReportData
from crosscoder.analysis.shares import Share

NO_CONTROL = (
    "This report has no null controls. Cut-offs are set by hand, and training alone spreads norms and ratios: how many "
    "latents lie beyond a cut-off means something only beside crosscoders of two sources that do not differ. "
    "Train them with: crosscoder controls RUN --null --seeds 4"
)
UNTESTED = (
    "The cut-offs of this report were calibrated on null crosscoders, but not tested on others: that takes more seeds."
)
UNLIKE = (
    "Some null crosscoders were trained with other settings than this one: cut-offs that they set are no like for like."
)
STALE = "The controls beside this run are of another crosscoder or analysis set, and were left out."
_NAMES = {"norm": "decoder norm", "scaling": "latent scaling", "joint": "both"}


def warning(data: ReportData) -> str:
    """What the head says where controls are missing, stale, untested or no like for like; nothing otherwise."""
    found = data.controls
    said = [STALE] if data.stale_controls else []
    if found is None or not found.calibrated:
        said.append(NO_CONTROL)
    elif not found.test_seeds:
        said.append(UNTESTED)
    if found is not None and not all(result.like_for_like for result in found.named("null")):
        said.append(UNLIKE)
    return "".join(f'<div class="warning"><p>{plain(line)}</p></div>' for line in said)


def controls(data: ReportData) -> str:
    """The section: cut-offs and their test, where null crosscoders set some, and all other controls."""
    found = data.controls
    if found is None:
        return section("Controls", f"<p>{plain(NO_CONTROL)}</p>", identity="controls")
    parts = [_cuts(found), _figures(found), _band(found)] if found.calibrated else [f"<p>{plain(NO_CONTROL)}</p>"]
    parts += [_runs(found), _stability(found), _directions(found), _notes(found)]
    return section("Controls", *parts, identity="controls", note=_note(found) if found.calibrated else "")


def _note(found: PairControls) -> str:
    wanted = found.scores[0].cut.wanted_share
    return (
        f"Null crosscoders were trained as this one was, on a made-up partner that differs from a by structureless "
        f"noise of the real difference's mean and covariance. Seeds {_listed(found.calibration_seeds)} set the "
        f"cut-offs, so that the upper 95 % bound of the share of null latents beyond is {wanted:.1%}; seeds "
        f"{_listed(found.test_seeds) or 'none'} tested them. Either side of this pair is judged by the made-up side of "
        "the nulls, which alone has something of its own: the noise."
    )


def _figures(found: PairControls) -> str:
    """The score that latents survive by, for both sides."""
    names = [score.cut.score for score in found.scores]
    shown = "scaling" if "scaling" in names else "norm"
    return f'<div class="figures">{"".join(_figure(s) for s in found.scores if s.cut.score == shown)}</div>'


def _band(found: PairControls) -> str:
    """Relative norms against the null's band: how many latents lie outside, with intervals."""
    if found.band is None or found.beyond_band is None:
        return ""
    beyond = found.beyond_band
    sides = " and ".join(
        f"{count.mean:,.0f} [{count.low:,.0f}, {count.high:,.0f}] {where}"
        for count, where in ((beyond.below, "below"), (beyond.above, "above"))
    )
    return (
        f'<p class="note">The middle 99.8 % of relative norms of calibrating nulls lie from {found.band.low:.3f} to '
        f"{found.band.high:.3f}. Of this pair {sides} lie outside, with 95 % intervals; {beyond.expected:.1f} are "
        "expected on either side.</p>"
    )


def _directions(found: PairControls) -> str:
    """What the difference says without any dictionary: its mean on first tokens, and its components."""
    rows: list[list[str]] = []
    if found.first_tokens is not None and found.first_tokens.readings is not None:
        first = found.first_tokens
        for position, length, reading in zip(
            first.positions, first.relative_lengths, found.first_tokens.readings, strict=True
        ):
            rows.append([f"mean difference at token {position}", f"{length:.2f} of ‖x_a‖", _pieces(reading.promoted)])
    if found.components is not None and found.components.readings is not None:
        for number, (share, reading) in enumerate(
            zip(found.components.shares, found.components.readings, strict=True), start=1
        ):
            rows.append([f"component {number} of the difference", f"{share:.1%}", _pieces(reading.promoted)])
    if not rows:
        return ""
    return "<h3>Without a dictionary</h3>" + table(["direction", "size", "promotes"], rows)


def _pieces(pieces: Sequence[str]) -> str:
    return f'<span class="wrap">{" · ".join(visible(piece) for piece in pieces)}</span>'


def _cuts(found: PairControls) -> str:
    head = [
        "score, side",
        "cut-off",
        "null beyond, unseen seeds",
        "upper 95 %",
        "this pair beyond",
        "expected by chance",
        "false discovery",
        *[plain(each.run) for each in _others(found)],
    ]
    return table(head, [_cut_row(score) for score in found.scores])


def _others(found: PairControls) -> list[Found]:
    """The other crosscoders that were held against the same cut-offs."""
    if not found.scores:
        return []
    first = found.scores[0]
    return [*([first.identical] if first.identical else []), *first.partners, *first.repeats]


def _cut_row(score: CalibratedScore) -> list[str]:
    tested: Share | None = None if score.test is None else score.test.false_share
    others = [*([score.identical] if score.identical else []), *score.partners, *score.repeats]
    side = f'<span class="side-{score.cut.side}">{score.cut.side}</span>'
    return [
        f"{_NAMES.get(score.cut.score, plain(score.cut.score))}, {side}",
        f"{score.cut.value:.3f}" + ("" if score.cut.assured else " (too few null latents to assure)"),
        "not tested" if tested is None else f"{tested.num_found:,} of {tested.num_latents:,} ({tested.share:.2%})",
        "" if tested is None else f"{tested.upper:.2%}",
        f"<b>{score.pair.num_beyond:,}</b> of {score.pair.num_latents:,}",
        f"{score.pair.expected:.1f}",
        _rate(score.pair),
        *(f"{each.num_beyond:,}" for each in others),
    ]


def _rate(found: Found) -> str:
    if found.false_discovery_rate is None:
        return ""
    upper = found.false_discovery_rate_upper
    return f"{found.false_discovery_rate:.0%}" + (
        "" if upper is None else f' <span class="range">to {upper:.0%}</span>'
    )


def _figure(score: CalibratedScore) -> str:
    """Shares of null latents and of the pair's in equal bins of specificity."""
    centres = [(place + 0.5) / NUM_BINS for place in range(NUM_BINS)]
    lines = [
        Curve(kind, centres, list(_shares(counts)))
        for kind, counts in (("other", score.null_histogram), (score.cut.side, score.histogram))
    ]
    drawing = curves(
        lines,
        x_ticks={0.0: "0", 0.25: ".25", 0.5: ".5", 0.75: ".75", 1.0: "1"},
        labels=(f"specificity to {score.cut.side}", "latents, log₁₀ of the share"),
        title=f"Specificity to {score.cut.side}: this pair and its nulls",
    )
    keys = f'<span class="key other"></span>null pairs<span class="key {score.cut.side}"></span>this pair'
    name = _NAMES.get(score.cut.score, score.cut.score)
    return figure(drawing, f"Specificity to {score.cut.side} ({plain(name)}); cut-off {score.cut.value:.3f}:{keys}")


def _shares(counts: tuple[int, ...]) -> Iterator[float]:
    """log₁₀ of the share in each bin; −5 for an empty one."""
    from math import log10

    total = max(1, sum(counts))
    return (max(-5.0, log10(count / total)) if count else -5.0 for count in counts)


def _runs(found: PairControls) -> str:
    head = ["control", "what it is", "latents live", "rows", "FVE", "L0", "dead"]
    return table(head, [_run_row(result) for result in found.runs])


def _run_row(result: ControlResult) -> list[str]:
    about = plain(result.about) + ("" if result.like_for_like else " (with other settings than the run)")
    return [
        plain(result.name),
        f'<span class="wrap">{about}</span>',
        f"{result.num_live:,} of {result.num_latents:,}",
        f"{result.num_rows:,}",
        f"{result.fve:.3f}",
        f"{result.l0:.1f}",
        f"{result.dead_fraction:.1%}",
    ]


def _stability(found: PairControls) -> str:
    if not found.stability:
        return ""
    head = [
        "another seed",
        "latents",
        "found again by decoder",
        "by activation",
        "beyond the cut-off again (both), b",
        "a",
    ]
    return table(head, [_stability_row(each) for each in found.stability])


def _stability_row(each: Stability) -> list[str]:
    name = "scaling" if "scaling/b" in each.beyond else "norm"
    again = [f"{each.beyond_again.get(f'{name}/{side}', 0)} of {each.beyond.get(f'{name}/{side}', 0)}" for side in "ba"]
    activation = each.share_by_activation
    return [
        plain(each.run),
        f"{each.num_live:,}",
        "" if each.share_by_decoder is None else f"{each.share_by_decoder:.0%} (cosine ≥ {each.cosine_cut:g})",
        "" if activation is None else f"{activation:.0%} (correlation ≥ {each.correlation_cut:g})",
        *again,
    ]


def _notes(found: PairControls) -> str:
    return "".join(f'<p class="note">{plain(note)}</p>' for note in found.notes)


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
