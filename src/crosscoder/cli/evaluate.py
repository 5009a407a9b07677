"""The body of `crosscoder evaluate`, and the table of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from crosscoder.cli.reporting import print_json, print_table, terminal

if TYPE_CHECKING:
    from crosscoder.analysis.evaluation import Evaluation


def run(path: str, *, out: Path | None, as_json: bool) -> None:
    """Evaluate a crosscoder and print the numbers."""
    with terminal() as view:
        from crosscoder import analysis

        evaluation = analysis.evaluate_run(path, out=out, progress=view)
    if as_json:
        print_json(evaluation.to_json())
        return
    print_evaluation(evaluation)
    several = len(evaluation.fve_per_source) > 1
    typer.echo(f"\nThe files are in {out or path}." + (f" Next: crosscoder diff {path}" if several else ""))


def print_evaluation(evaluation: Evaluation) -> None:
    """Reconstruction and cross-entropy, by source."""
    typer.echo(f"held-out rows {evaluation.num_rows:,}   L0 {evaluation.l0:.1f}   dead {evaluation.dead_fraction:.1%}")
    rows = [
        (
            key,
            f"{fve:.3f}",
            _optional(evaluation.ce_recovered.get(key)),
            _optional(evaluation.ce_recovered_mean.get(key)),
        )
        for key, fve in evaluation.fve_per_source.items()
    ]
    both = ("all sources", f"{evaluation.fve:.3f}", "", "")
    print_table(("source", "FVE", "CE recovered (zero)", "CE recovered (mean)"), [*rows, both])
    found = evaluation.replacement
    if found is not None:
        typer.echo(
            f"replacement model: cross-entropy {found.clean:.3f} → {found.replaced:.3f}   "
            f"same favourite token {found.top1_agreement:.1%}   KL {found.kl:.3f}"
        )


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
