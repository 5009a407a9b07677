"""The bodies of `crosscoder train`, `--dry-run` and `--keys`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from crosscoder.cli.reporting import print_json, print_pairs, terminal
from crosscoder.training import runfile, several
from crosscoder.training.progress import ProgressSink
from crosscoder.training.sinks import Sink, tensorboard_sink, wandb_sink

TRACKERS = {"wandb": wandb_sink, "tensorboard": tensorboard_sink}


def run(path: Path, overrides: Sequence[str], *, trackers: Sequence[str], as_json: bool) -> None:
    """Train the dictionaries of a file, and print their final metrics."""
    runs = several.load(path, overrides)
    with terminal() as view:
        from crosscoder.training.run import train_together

        def make_sinks(name: str) -> list[Sink]:
            label = "training" if len(runs) == 1 else f"training {name}"
            return [ProgressSink(view, label=label), *(TRACKERS[tracker]() for tracker in trackers)]

        results = train_together(runs, sinks=make_sinks, progress=view)
    described = [{"run": str(result.path), "metrics": dict(result.metrics)} for result in results]
    if as_json:
        print_json(described[0] if len(described) == 1 else {"runs": described})
        return
    for result in results:
        if len(results) > 1:
            typer.echo(f"{result.path.name}")
        held_out = {name: value for name, value in result.metrics.items() if name.startswith("held_out/")}
        print_pairs(held_out or result.metrics)
        typer.echo(f"\nThe run is in {result.path}. Next: crosscoder evaluate {result.path}")


def dry_run(path: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what the run would take, without starting it."""
    runs = several.load(path, overrides)
    with terminal():
        from crosscoder.training.plan import plan

        planned = plan(*runs)
    if as_json:
        print_json(asdict(planned))
    else:
        print_pairs(planned.in_words())


def list_keys(*, as_json: bool) -> None:
    """Print every key of a run file."""
    keys = runfile.keys(several.RunFile)
    if as_json:
        print_json([asdict(key) for key in keys])
        return
    for key in keys:
        default = f" [{key.default}]" if key.default else ""
        typer.echo(f"{key.path}{default}\n    {key.description}")
        if key.kinds:
            typer.echo(f"    Of kind {', '.join(key.kinds)}")
