"""The body of `crosscoder diff`, and the tables of a diff."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from crosscoder.cli.reporting import print_json, print_table, terminal

if TYPE_CHECKING:
    from crosscoder.analysis import Diff, LabelScore, LabelScores
    from crosscoder.analysis.diff_cards import Unmeasured
    from crosscoder.analysis.survivors import Survivors
    from crosscoder.interventions.patching_curves import PatchingCurves


@dataclass(frozen=True)
class Question:
    """What is compared, and beside what."""

    a: str | None
    b: str | None
    labels: Path | None
    baseline: str | None
    cutoffs: str
    num_patched: int


def run(path: str, question: Question, *, out: Path | None, as_json: bool) -> None:
    """Diff two sources of a crosscoder and print what was found."""
    with terminal() as view:
        from crosscoder import analysis

        diff = analysis.diff_run(
            path,
            a=question.a,
            b=question.b,
            labels=None if question.labels is None else analysis.Labelled(question.labels, question.baseline),
            cutoffs=question.cutoffs,
            num_patched=question.num_patched,
            out=out,
            progress=view,
        )
    if as_json:
        print_json({"path": str(diff.path), **diff.to_json()})
        return
    print_diff(diff)
    typer.echo(f"\nOpen the report: {diff.report}")


def print_diff(diff: Diff) -> None:
    """Classes of latents, and scores of labels where there are some."""
    classes = diff.classes
    typer.echo(f"a = {classes.a}   b = {classes.b}")
    print_table(list(classes.counts), [[f"{count:,}" for count in classes.counts.values()]])
    for side, found in sorted(diff.most.items(), reverse=True):
        typer.echo(_specific(side, found))
    typer.echo(_patched(diff.patching))
    if diff.labels is not None:
        typer.echo()
        print_labels(diff.labels)


def _specific(side: str, found: Survivors) -> str:
    """How many latents are a side's own, and what a null would lead one to expect."""
    first = ", ".join(map(str, found.latents[:8])) + (" ..." if len(found.latents) > 8 else "")
    if found.calibrated is None:
        return f"most specific to {side}, without controls (crosscoder controls): {first or 'none'}"
    return f"specific to {side}: {len(found.latents):,} ({found.calibrated.by_chance}): {first}".rstrip(": ")


def _patched(found: PatchingCurves | Unmeasured) -> str:
    """How much of the gap between the models all latents close; or why that is not known."""
    from crosscoder.analysis.diff_cards import Unmeasured
    from crosscoder.interventions.patching_curves import Condition

    if isinstance(found, Unmeasured):
        return f"no KL patching: {found.reason}"
    share = found.share_recovered(Condition("reference", "latents"))
    gap = found.divergence(Condition("reference", "none")).value
    return (
        f"KL of b on a's activations {gap:.3f}; all latents close {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
    )


def print_labels(scores: LabelScores) -> None:
    """AUROC of the best latent on documents that did not choose it, beside simpler detectors, for every label."""
    head = ("label", "AUROC: best latent", "95 %", "relative norm", "baseline", "mean difference")
    print_table(head, [_label_row(label) for label in scores.labels])
    if scores.num_absent:
        typer.echo(f"{scores.num_absent:,} labelled documents are not in the analysis set.")


def _label_row(label: LabelScore) -> tuple[str, ...]:
    found = {score.detector: score for score in label.scores}
    best = found.get("latent")
    others = [found.get(name) for name in ("baseline latent", "mean difference")]
    return (
        label.label,
        "" if best is None else f"{best.auroc:.3f}",
        "" if best is None else f"{best.auroc_low:.2f}–{best.auroc_high:.2f}",
        "" if best is None or best.relative_norm is None else f"{best.relative_norm:.2f}",
        *("" if other is None else f"{other.auroc:.3f}" for other in others),
    )
