"""The body of `crosscoder controls`, and the tables of what controls say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from crosscoder.cli.reporting import print_json, print_table, terminal

if TYPE_CHECKING:
    from crosscoder.analysis.calibrated import Found
    from crosscoder.analysis.control_plan import WantedControls
    from crosscoder.analysis.pair_controls import CalibratedScore, PairControls


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    a: str | None
    b: str | None
    kinds: tuple[str, ...]
    seeds: int
    partners: tuple[str, ...]
    overrides: tuple[str, ...]

    def wanted(self) -> WantedControls:
        """The same, checked; null pairs where nothing was named."""
        from crosscoder.analysis.control_plan import WantedControls
        from crosscoder.errors import ConfigError

        pairs = [text.partition("=") for text in self.partners]
        for text, (alias, equals, path) in zip(self.partners, pairs, strict=True):
            if not (alias and equals and path):
                raise ConfigError(
                    f"expected --partner ALIAS=PATH; got {text!r}.", hint="For example chat=path/to/model"
                )
        partners = {alias: path for alias, _, path in pairs}
        if len(partners) < len(pairs):
            raise ConfigError("one alias is given two partners; each command trains one.", hint="Run it once for each.")
        kinds = self.kinds or (() if partners else ("null",))
        return WantedControls(kinds, self.seeds, partners, self.overrides)  # pyright: ignore[reportArgumentType]


def run(path: str, asked: Asked, *, out: Path | None, as_json: bool) -> None:
    """Train the controls that are missing, and print what all of them say."""
    with terminal() as view:
        from crosscoder.analysis.control_runs import run_controls
        from crosscoder.training.progress import ProgressSink

        found = run_controls(
            path,
            asked.wanted(),
            a=asked.a,
            b=asked.b,
            out=out,
            sinks=lambda label: [ProgressSink(view, label=label)],
            progress=view,
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_controls(found)


def dry_run(path: str, asked: Asked, *, out: Path | None, as_json: bool) -> None:
    """Only list what would be trained."""
    with terminal():
        from crosscoder.analysis.control_runs import plan_controls

        controls = plan_controls(path, asked.wanted(), a=asked.a, b=asked.b, out=out)
    rows = sum(control.run.train.num_tokens for control in controls if not control.finished)
    if as_json:
        print_json({"controls": [control.to_json() for control in controls], "num_rows_to_train": rows})
        return
    print_table(
        ("control", "rows", "state", "what it is"),
        [(c.name, f"{c.run.train.num_tokens:,}", "finished" if c.finished else "to train", c.about) for c in controls],
    )
    typer.echo(f"\n{rows:,} rows to train.")


def print_controls(found: PairControls) -> None:
    """Notes, cut-offs with their test, and counts beyond them."""
    typer.echo(f"a = {found.a}   b = {found.b}")
    for note in found.notes:
        typer.echo(note)
    if found.scores:
        typer.echo(f"\nCut-offs from null seeds {_numbers(found.calibration_seeds)}, {_tested(found)}:")
        head = ("score", "side", "cut", "null share", "at most", "beyond", "expected", "false discoveries")
        print_table(head, [_score_row(score) for score in found.scores])
        typer.echo("\nLatents beyond the same cuts in other runs:")
        print_table(*_counts(found))
    if found.stability:
        typer.echo("\nLatents that come back with another seed:")
        print_table(
            ("run", "by decoder", "by activation"),
            [(s.run, f"{s.share_by_decoder:.1%}", _percent(s.share_by_activation)) for s in found.stability],
        )
    typer.echo("")
    print_table(
        ("control", "latents", "live", "rows", "FVE", "what it is"),
        [
            (r.name, f"{r.num_latents:,}", f"{r.num_live:,}", f"{r.num_rows:,}", f"{r.fve:.3f}", r.about)
            for r in found.runs
        ],
    )


def _tested(found: PairControls) -> str:
    return f"tested on {_numbers(found.test_seeds)}" if found.test_seeds else "not tested"


def _score_row(score: CalibratedScore) -> tuple[str, ...]:
    share = None if score.test is None else score.test.false_share
    return (
        score.cut.score,
        score.cut.side,
        f"{score.cut.value:.3f}",
        _percent(None if share is None else share.share),
        _percent(None if share is None else share.upper),
        f"{score.pair.num_beyond:,}",
        f"{score.pair.expected:.1f}",
        _percent(score.pair.false_discovery_rate),
    )


def _counts(found: PairControls) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row per run, one column per score and side."""
    columns = {f"{s.cut.score}/{s.cut.side}": _of_all(s) for s in found.scores}
    names = list(dict.fromkeys(count.run for counts in columns.values() for count in counts))
    rows = [
        (name, *(f"{next(c.num_beyond for c in counts if c.run == name):,}" for counts in columns.values()))
        for name in names
    ]
    return ("run", *columns), rows


def _of_all(score: CalibratedScore) -> list[Found]:
    return [score.pair, *score.repeats, *score.partners, *([] if score.identical is None else [score.identical])]


def _numbers(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
