"""Training the controls of a run, and putting what they say into `controls/summary.json`: `crosscoder controls`.

Each control is an ordinary run in `controls/<name>/`, resumed and skipped like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crosscoder.analysis.control_plan import COMPARED, OF_THE_PAIR, Control, WantedControls, identity_of, planned
from crosscoder.analysis.control_summary import summary
from crosscoder.analysis.finished_controls import FinishedControl, finished, pair_specificity
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.analysis.pair_controls import PairControls, write_controls
from crosscoder.progress import Progress, silent
from crosscoder.training.plan import plan
from crosscoder.training.run import TrainResult, train
from crosscoder.training.sinks import Sink

MakeSinks = Callable[[str], Sequence[Sink]]


def run_controls(
    path: str | Path,
    wanted: WantedControls = WantedControls(),  # noqa: B008 (frozen)
    *,
    a: str | None = None,
    b: str | None = None,
    out: str | Path | None = None,
    sinks: MakeSinks = lambda label: (),
    progress: Progress = silent,
) -> PairControls:
    """Train the controls of a pair that are not there yet, measure their latents, and write the summary of them all.

    `a` and `b` may be left out where the crosscoder writes just two sources. The same call goes on after a stop. Raises
    as `planned` and `train` do; RunConflict for a run that is not finished.
    """
    run = open_run(path, out=out, progress=progress)
    a, b = run.pair(a, b)
    controls = planned(run, wanted, a=a, b=b)
    _check_models(controls)
    for number, control in enumerate(controls, start=1):
        label = f"{control.name} ({number} of {len(controls)})"
        result = train(control.run, sinks=sinks(label), progress=progress)
        _record(run, control, result, wanted, pair=(a, b))
        if control.kind in COMPARED:
            pair_specificity(open_run(control.path, progress=progress), a=a, b=b)
    found = summary(run, finished(run, a=a, b=b), a=a, b=b)
    write_controls(run.out, found)
    return found


def plan_controls(
    path: str | Path,
    wanted: WantedControls = WantedControls(),  # noqa: B008 (frozen)
    *,
    a: str | None = None,
    b: str | None = None,
    out: str | Path | None = None,
) -> tuple[Control, ...]:
    """What `run_controls` would train, without training it; models that are not there are named here already."""
    run = open_run(path, out=out)
    a, b = run.pair(a, b)
    controls = planned(run, wanted, a=a, b=b)
    _check_models(controls)
    return controls


def _check_models(controls: Sequence[Control]) -> None:
    """Other models are looked at before anything is trained for hours."""
    for control in controls:
        if control.kind == "partner" and not control.finished:
            plan(control.run)


def _record(
    run: OpenedRun, control: Control, result: TrainResult, wanted: WantedControls, *, pair: tuple[str, str]
) -> FinishedControl:
    """Write down what was trained; the numbers are of its held-out text."""
    held_out: dict[str, Any] = {name: result.metrics[f"held_out/{name}"] for name in ("fve", "l0", "dead_fraction")}
    a, b = pair if control.kind in OF_THE_PAIR else (None, None)
    found = FinishedControl(
        path=control.path,
        kind=control.kind,
        about=control.about,
        seed=control.seed,
        of=identity_of(run.config),
        a=a,
        b=b,
        overrides=wanted.overrides,
        num_latents=result.crosscoder.num_latents,
        num_rows=control.run.train.num_tokens,
        **held_out,
    )
    found.save()
    return found
