"""Does the other model really lack it? Latent scaling along each side's directions, and what fine-tuning turned up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from crosscoder.analysis.classes import CLASSES
from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.analysis.markup import figure, plain, section, table
from crosscoder.analysis.pair import PairStatistics
from crosscoder.analysis.plots import bars, tiles
from crosscoder.analysis.report.data import ReportData, ranged

_SPAN = (-0.5, 1.5)
_RATIO_EDGES = np.linspace(-3.0, 3.0, 49)
_KINDS = ("a", "shared", "b", "other", "other", "other")
"""Colour classes in the order of `CLASSES`."""
CUTS = (0.2, 0.5)
"""Minder et al. 2025: a latent is specific with ν error below the first and ν reconstruction below the second."""


def scaling(data: ReportData) -> str:
    """The section; it says why where scaling has no meaning."""
    pair = data.pair
    if pair is None:
        return ""
    if pair.reason is not None:
        said = f"<p>Latent scaling has no meaning here: {plain(pair.reason)}</p>"
        return section("Does the other model lack it?", said, identity="scaling")
    drawn = "".join(_scatter(pair, side) for side in ("b", "a"))
    note = (
        "ν compares how much of a latent both models have, along the latent's own direction, whatever its norms say: "
        "near 0 the other model lacks it, near 1 it has as much. High ν error under a small norm is shrinkage; high ν "
        "reconstruction says that other latents write it there (decoupling). Lines are the cut-offs of Minder et al."
    )
    parts = [table(_HEAD, [_row(pair, name) for name in _ROWS]), f'<div class="figures">{drawn}</div>', _twins(pair)]
    return section("Does the other model lack it?", *parts, identity="scaling", note=note)


def changes(data: ReportData) -> str:
    """What was amplified and attenuated: most of what tuning does to latents that both models share."""
    pair = data.pair
    if pair is None or pair.reason is not None:
        return ""
    found = pair.amplification
    ratio = found.own_ratio.numpy()
    ranked = found.ranked.numpy() & np.isfinite(ratio)
    counts = np.histogram(ratio[ranked].clip(*_RATIO_EDGES[[0, -1]]), _RATIO_EDGES)[0]
    kinds = ["a" if edge < -1 else "b" if edge >= 1 else "shared" for edge in _RATIO_EDGES[:-1]]
    drawing = bars(
        counts,
        _RATIO_EDGES,
        kinds=kinds,
        x_ticks={-2.0: "¼", -1.0: "½", 0.0: "alike", 1.0: "2 ×", 2.0: "4 ×"},
        labels=("b over a", "latents (log)"),
        title="How much stronger each shared latent is in b",
    )
    listed = [_changed(data, way) for way in ("amplified", "attenuated")]
    numbers = found.to_json()["log2_own_ratio"]
    note = (
        f"Of {int(found.ranked.sum()):,} latents that both models write (active on at least {found.min_active} rows), "
        f"{numbers['num_doubled']:,} are at least twice as strong in b and {numbers['num_halved']:,} at most half, "
        f"measured on what the other latents leave. {numbers['num_without']:,} have no such ratio: one model carries "
        "nothing of them."
    )
    caption = "What the other latents leave for it in b over the same in a, each along its own direction. Log scale."
    body = f'<div class="figures">{figure(drawing, caption)}{"".join(listed)}</div>'
    return section("What fine-tuning turned up and down", body, identity="changes", note=note)


_HEAD = ["latents", "number", "specific to b", "interval below both cut-offs", "specific to a", "interval below both"]
_ROWS = ("a-only", "shared", "b-only", "other")


def _row(pair: PairStatistics, name: str) -> list[str]:
    """One class by norm, and what scaling says of it at the published cut-offs."""
    chosen = np.zeros(len(pair.classes.class_ids), dtype=bool)
    chosen[pair.classes.learned(name).cpu().numpy()] = True
    cells = [plain(name), f"{int(chosen.sum()):,}"]
    for scaled in (pair.toward_b, pair.toward_a):
        cells += [
            f"{int((scaled.specific().numpy() & chosen).sum()):,}",
            f"{int((_surely_below(scaled) & chosen).sum()):,}",
        ]
    return cells


def _surely_below(scaled: LatentScaling) -> Bool[np.ndarray, "latents"]:
    """Both intervals wholly within the cut-offs."""
    ends = scaled.intervals
    if ends is None:
        return np.zeros(len(scaled.num_active), dtype=bool)
    error, reconstruction = (np.abs(e.numpy()).max(1) for e in (ends.nu_error, ends.nu_reconstruction))
    return (error < CUTS[0]) & (reconstruction < CUTS[1]) & scaled.specific().numpy()


def _scatter(pair: PairStatistics, side: str) -> str:
    scaled = pair.toward_b if side == "b" else pair.toward_a
    error, reconstruction = scaled.nu_error.numpy(), scaled.nu_reconstruction.numpy()
    there = pair.specificity.live.numpy() & np.isfinite(error) & np.isfinite(reconstruction)
    kinds = [_KINDS[i] for i in pair.classes.class_ids.cpu().numpy()[there]]
    assert len(_KINDS) == len(CLASSES)
    drawing = tiles(
        _within(error[there]),
        _within(reconstruction[there]),
        span=_SPAN,
        kinds=kinds,
        cuts=CUTS,
        labels=("ν error", "ν reconstruction"),
        title=f"Latent scaling along {side}'s directions",
    )
    return figure(drawing, f'Along <span class="side-{side}">{side}</span>’s directions: bottom left is {side} alone.')


def _within(values: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
    return values.clip(*_SPAN)


def _twins(pair: PairStatistics) -> str:
    if pair.twins is None or pair.together is None:
        return ""
    number = len(pair.twins.cosine)
    if not number:
        return '<p class="note">No a-only and b-only latent point the same way: no concept was split by its norms.</p>'
    overlap = pair.together.to_json()["median_overlap"]
    fired = "" if overlap is None else f" The median pair fires together on {overlap:.0%} of the rarer one's rows."
    return f'<p class="note">{number:,} pairs of an a-only and a b-only latent point the same way.{fired}</p>'


def _changed(data: ReportData, way: str) -> str:
    assert data.pair is not None
    found = data.pair.amplification
    latents: Sequence[int] = found.most("amplified" if way == "amplified" else "attenuated", by="own", num=10).tolist()
    rows = [
        [
            _linked(data, latent),
            ranged(float(2 ** found.own_ratio[latent])),
            f"{int(found.num_active[latent]):,}",
        ]
        for latent in latents
    ]
    return f"<div><h3>Most {way} in b</h3>{table(['latent', 'b over a', 'rows'], rows)}</div>"


def _linked(data: ReportData, latent: int) -> str:
    return f'<a href="#latent-{latent}">{latent}</a>' if latent in data.cards else f"{latent}"
