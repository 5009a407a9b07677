"""`crosscoder demo` step by step: train, train the control, evaluate, diff with labels, and a short table.

The control is a sparse autoencoder of `base` alone, with the same text, size and length: what its best latent scores on
a planted behaviour is what one gets without seeing the fine-tuned model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from crosscoder import analysis
from crosscoder.demo.files import books_path, dialogues_path, labels_path, model_path
from crosscoder.progress import Progress, silent
from crosscoder.training.config import AcausalConfig, RunConfig, SaeConfig
from crosscoder.training.run import train
from crosscoder.training.sinks import Sink

BASELINE = Path("controls", "sae-base")
MakeSinks = Callable[[str], list[Sink]]


@dataclass(frozen=True)
class DemoResult:
    """Where the run lies and what was found."""

    path: Path
    evaluation: analysis.Evaluation
    diff: analysis.Diff


def run_config(out: Path) -> RunConfig:
    """The demo's run, with the shipped models and text at the places where this installation has them."""
    models = [f"models.{alias}.path={model_path(alias)}" for alias in ("base", "chat")]
    text = [f"text.mix.{place}.dataset={path}" for place, path in enumerate((books_path(), dialogues_path()))]
    with as_file(files("crosscoder.demo") / "run.yaml") as template:
        return RunConfig.load(template, [*models, *text, f"out={out}"])


def baseline_config(run: RunConfig, out: Path) -> RunConfig:
    """The same run on the source of `base` alone, as a sparse autoencoder."""
    assert isinstance(run.wiring, AcausalConfig), "as the demo's run file says"
    changes = {
        "sources": run.sources[:1],
        "wiring": SaeConfig(num_latents=run.wiring.num_latents),
        "out": str(out / BASELINE),
    }
    return run.model_copy(update=changes)


def run_demo(out: Path, *, sinks: MakeSinks = lambda label: [], progress: Progress = silent) -> DemoResult:
    """The whole demo; an interrupted one goes on where it stopped."""
    run = run_config(out)
    trained = train(run, sinks=sinks("training the crosscoder"), progress=progress)
    baseline = train(baseline_config(run, out), sinks=sinks("training an SAE of base"), progress=progress)
    evaluation = analysis.evaluate_run(trained.path, progress=progress)
    diff = analysis.diff_run(
        trained.path,
        a="base",
        b="chat",
        labels=analysis.Labelled(labels_path(), baseline=baseline.path),
        progress=progress,
    )
    return DemoResult(trained.path, evaluation, diff)
