"""Where latents write: relative norms, cosines and densities, drawn by class."""

from __future__ import annotations

import numpy as np

from crosscoder.analysis.classes import CLASSES, CUTOFFS, CutOffs
from crosscoder.analysis.markup import figure, section
from crosscoder.analysis.plots import bars, steps
from crosscoder.analysis.report.data import ReportData

_NORM_EDGES = np.linspace(0.0, 1.0, 51)
_COSINE_EDGES = np.linspace(-1.0, 1.0, 41)
_DENSITY_EDGES = np.linspace(-6.0, 0.0, 25)
_KINDS = {"a-only": "a", "shared": "shared", "b-only": "b", "other": "other"}


def norms(data: ReportData) -> str:
    """The section, with its three plots."""
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
