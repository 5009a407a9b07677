"""The body of `crosscoder demo`: the demo with a progress view, and its table."""

from __future__ import annotations

from pathlib import Path

import typer

from crosscoder.cli.diff import print_diff
from crosscoder.cli.evaluate import print_evaluation
from crosscoder.cli.reporting import print_json, terminal
from crosscoder.training.progress import ProgressSink


def run(out: Path, *, as_json: bool) -> None:
    """Run the demo and print what it found."""
    with terminal() as view:
        from crosscoder.demo.run import run_demo

        result = run_demo(out, sinks=lambda label: [ProgressSink(view, label=label)], progress=view)
    if as_json:
        print_json({"run": str(result.path), "evaluation": result.evaluation.to_json(), "diff": result.diff.to_json()})
        return
    print_evaluation(result.evaluation)
    typer.echo()
    print_diff(result.diff)
    typer.echo(f"\nThe run is in {result.path}. Open the report: {result.diff.report}")
