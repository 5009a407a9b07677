"""False-exclusive latents: cut-offs from some null seeds, tested on others, with the recall of plants beside them.

On a run of the demo's pair (trained first where there is none) and its controls, which `crosscoder controls` trains and
this continues: null pairs (the first half of the seeds calibrates, the second tests), an identical copy, a partner
without the plants, repeats, and autoencoders at equal compute. A planted label counts as found at a cut where a latent
beyond it tells the label from its look-alikes with an AUROC of at least .9 on both halves of the documents.

    python benchmarks/null.py                                   # everything, in runs/benchmarks/null: about an hour
    python benchmarks/null.py --run RUN --report-only           # what the controls of a run say so far
    python benchmarks/null.py --quick --run runs/q              # shows that it runs, proves nothing
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crosscoder
from crosscoder.activations import ROLES
from crosscoder.analysis import PairControls, read_labels
from crosscoder.analysis.calibrated import Cut
from crosscoder.analysis.control_plan import WantedControls
from crosscoder.analysis.control_runs import run_controls
from crosscoder.analysis.finished_controls import finished, pair_specificity
from crosscoder.analysis.label_scores import choosing_half
from crosscoder.analysis.labelled_rows import LabelledRows, labelled_rows, select_rows
from crosscoder.analysis.labels import locate_labels
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.analysis.ranking import Truth, auroc_of_latents
from crosscoder.analysis.specificity import Specificity
from crosscoder.demo.files import labels_path, model_path
from crosscoder.demo.run import run_config
from crosscoder.training.config import RunConfig
from crosscoder.training.json_numbers import json_text
from crosscoder.training.run import train
from crosscoder.training.runfile import override, validate

PAIR = ("base", "chat")
AUROC = 0.9
TARGET = 0.01
"""The upper 95 % bound of the false-exclusive share on unseen seeds."""
LEANING = (
    "The noise of a structureless null is its made-up side's alone, and latents that hold it are rightly exclusive: "
    "cuts on norms are strict. Both sides of the pair are judged by the made-up side."
)
QUICK = (
    "train.num_tokens=20480",
    "normaliser.num_tokens=10240",
    "wiring.num_latents=256",
    "nonlinearity.k=8",
    "text.held_out.num_tokens=20000",
)


@dataclass(frozen=True)
class Plant:
    """A label, the latents that tell it, and the best of those beyond each cut (`score/side`), if any."""

    run: str
    label: str
    num_documents: int
    best_auroc: float
    best_latent: int
    num_telling: int
    beyond: dict[str, int | None]


def main() -> None:
    """Train what is missing, read what the controls say, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if not (options.run / "run.yaml").exists():
        train(demo_run(options))
    found = run_controls(options.run, wanted(options), a=PAIR[0], b=PAIR[1])
    run = open_run(options.run)
    plants = [plant for name, each in runs_of_the_pair(run, found) for plant in recall(name, each, found)]
    facts = about(options, run)
    result = {
        "format": "crosscoder.null/1",
        "about": facts,
        "controls": found.to_json(),
        "plants": [asdict(plant) for plant in plants],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    report = as_markdown(found, plants, facts)
    (options.out / "null.json").write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "null.md").write_text(report, encoding="utf-8")
    print(report)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="How many latents does training alone make exclusive?")
    parser.add_argument("--run", type=Path, default=Path("runs/benchmarks/null/run"), help="the run, new or finished")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/null"), help="directory of the report")
    parser.add_argument("--seeds", type=int, default=6, help="null seeds; half of them as many repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report-only", action="store_true", help="train nothing: what finished controls say")
    parser.add_argument("--quick", action="store_true", help="256 latents, 20,480 rows, two seeds")
    options = parser.parse_args()
    if options.quick:
        options.seeds = 2
    return options


def demo_run(options: argparse.Namespace) -> RunConfig:
    """The demo's run, or a small one."""
    config = run_config(options.run)
    if not options.quick:
        return config
    raw = override(config.model_dump(mode="json"), QUICK, schema=RunConfig)
    return validate(RunConfig, raw, name="quick run")


def wanted(options: argparse.Namespace) -> WantedControls:
    """All kinds of controls; those that are finished are not trained again."""
    if options.report_only:
        return finished_ones(options.run)
    kinds = ("null", "identical", "repeat", "baselines")
    return WantedControls(kinds, seeds=options.seeds, partners={"chat": str(model_path("plain"))})


def finished_ones(path: Path) -> WantedControls:
    """Only what is there: asking for the finished null seeds trains nothing."""
    run = open_run(path)
    seeds = [
        control.seed for control in finished(run, a=run.pair(*PAIR)[0], b=run.pair(*PAIR)[1]) if control.kind == "null"
    ]
    return WantedControls(("null",), seeds=len(seeds))


def runs_of_the_pair(run: OpenedRun, found: PairControls) -> Iterator[tuple[str, OpenedRun]]:
    """The run, its repeats, and the partners that lack the plants."""
    yield "this run", run
    for control in (*found.named("repeat"), *found.named("partner")):
        yield control.name, open_run(run.out / "controls" / control.name)


def recall(name: str, run: OpenedRun, found: PairControls) -> Iterator[Plant]:
    """For every label, whether a latent that tells it lies beyond each cut."""
    scores = pair_specificity(run, a=found.a, b=found.b)
    located = locate_labels(read_labels(labels_path()), run.text)
    rows = labelled_rows(run.crosscoder, run.activations(), run.text, located=located)
    hashes = [document.hash for document in run.text.documents]
    for number, label in enumerate(rows.names):
        halves, documents = aurocs(rows, number, hashes)
        telling = np.asarray((halves >= AUROC).all(0))
        worse = halves.min(0)
        yield Plant(
            run=name,
            label=label,
            num_documents=documents,
            best_auroc=float(np.nanmax(worse)),
            best_latent=int(np.nanargmax(worse)),
            num_telling=int(telling.sum()),
            beyond={key(score.cut): best_beyond(score.cut, scores, telling, worse) for score in found.scores},
        )


def aurocs(rows: LabelledRows, number: int, hashes: list[str]) -> tuple[np.ndarray, int]:
    """The AUROC of every latent on either half of a label's documents, (2, latents); and how many documents."""
    value, role = rows.values[number], rows.role
    both = set(role[value == 1]) & set(role[value == -1]) - {ROLES.index("template")}
    chosen = (value != 0) & np.isin(role, list(both))
    truth, code, document = (
        Truth(value[chosen] == 1, role[chosen]),
        select_rows(rows.code, chosen),
        rows.document[chosen],
    )
    first = choosing_half(document, truth.positive, hashes)
    halves = [auroc_of_latents(select_rows(code, half), truth.of(half)) for half in (first, ~first)]
    return np.stack(halves), len(np.unique(document))


def best_beyond(cut: Cut, scores: Specificity, telling: np.ndarray, worse: np.ndarray) -> int | None:
    """Of the latents that tell the label and lie beyond the cut, the one that tells it best."""
    both = telling & cut.beyond(scores.score(cut.score, cut.side)).numpy()
    return int(np.argmax(np.where(both, worse, -1.0))) if both.any() else None


def key(cut: Cut) -> str:
    """A cut's name in tables."""
    return f"{cut.score}/{cut.side}"


def about(options: argparse.Namespace, run: OpenedRun) -> dict[str, Any]:
    """What made these numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} threads",
        "latents": run.crosscoder.num_latents,
        "rows": run.config.train.num_tokens,
        "k": run.config.k,
        "held-out rows": int(run.text.kept.sum()),
    }


def as_markdown(found: PairControls, plants: list[Plant], facts: dict[str, Any]) -> str:
    """The report."""
    calibrating, testing = (", ".join(map(str, seeds)) for seeds in (found.calibration_seeds, found.test_seeds))
    lines = [f"# Null pairs and cut-offs, {facts['date']}", ""]
    lines += [" · ".join(f"{name} {value}" for name, value in facts.items() if name != "date"), ""]
    lines += [
        f"Command: `python benchmarks/null.py`. Seeds {calibrating} of the null calibrate, {testing or 'none'} test.",
        "",
    ]
    lines += [*map("- {}".format, found.notes), ""] if found.notes else []
    lines += [
        *_cuts(found),
        "",
        *_counts(found),
        "",
        *_plants(found, plants),
        "",
        *_stability(found),
        "",
        *_runs(found),
    ]
    lines += ["", *_directions(found)]
    return "\n".join(lines) + "\n"


def _cuts(found: PairControls) -> Iterator[str]:
    yield "## False-exclusive share"
    yield ""
    yield (
        f"The cut leaves at most .2 % of calibrating null latents beyond it, with 95 % confidence. Target on unseen "
        f"seeds: an upper 95 % bound of at most {TARGET:.0%} (the larger of the bounds by latents and by seeds)."
    )
    yield ""
    yield LEANING
    yield ""
    head = ["score", "side", "cut", "unseen null latents beyond", "share", "upper: latents", "upper: seeds", "target"]
    head += ["pair beyond", "expected", "false discovery rate"]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for score in found.scores:
        test = score.test
        if test is None:
            tested = ["not tested", "", "", "", ""]
        else:
            share = test.false_share
            by_seeds = "" if share.upper_by_seeds is None else f"{share.upper_by_seeds:.2%}"
            met = "met" if share.upper <= TARGET else "not met"
            tested = [
                f"{share.num_found} of {share.num_latents:,}",
                f"{share.share:.2%}",
                f"{share.upper_by_latents:.2%}",
                by_seeds,
                met,
            ]
        pair = score.pair
        rate = "" if pair.false_discovery_rate is None else f"{pair.false_discovery_rate:.0%}"
        cells = [
            score.cut.score,
            score.cut.side,
            f"{score.cut.value:.3f}",
            *tested,
            str(pair.num_beyond),
            f"{pair.expected:.1f}",
            rate,
        ]
        yield f"| {' | '.join(cells)} |"


def _counts(found: PairControls) -> Iterator[str]:
    counts = {
        key(s.cut): [s.pair, *s.repeats, *s.partners, *([s.identical] if s.identical else [])] for s in found.scores
    }
    if not counts:
        return
    yield "## Latents beyond the same cuts"
    yield ""
    yield f"| run | {' | '.join(counts)} |"
    yield "|---" * (len(counts) + 1) + "|"
    for place, first in enumerate(next(iter(counts.values()))):
        yield f"| {first.run} | {' | '.join(str(each[place].num_beyond) for each in counts.values())} |"


def _plants(found: PairControls, plants: list[Plant]) -> Iterator[str]:
    cuts = [key(score.cut) for score in found.scores]
    yield "## Plants at the same cuts"
    yield ""
    yield (
        f"Latents that tell a label with an AUROC of at least {AUROC} on both halves of its documents; `best` is the "
        "largest of the worse half. For every cut the best such latent beyond it, if there is one."
    )
    yield ""
    yield f"| run | label | documents | best | latents | {' | '.join(cuts)} |"
    yield "|---" * (5 + len(cuts)) + "|"
    for plant in plants:
        cells = ["no" if plant.beyond[cut] is None else f"latent {plant.beyond[cut]}" for cut in cuts]
        yield (
            f"| {plant.run} | {plant.label} | {plant.num_documents} | {plant.best_auroc:.3f} | {plant.num_telling} | "
            f"{' | '.join(cells)} |"
        )
    yield ""
    for run in dict.fromkeys(plant.run for plant in plants):
        own = [plant for plant in plants if plant.run == run]
        told = [plant for plant in own if plant.num_telling]
        shares = [f"{cut} {sum(p.beyond[cut] is not None for p in own)} of {len(own)}" for cut in cuts]
        yield f"- {run}: {len(told)} of {len(own)} labels have a latent that tells them; beyond: {', '.join(shares)}."


def _stability(found: PairControls) -> Iterator[str]:
    if not found.stability:
        return
    yield "## Seed stability"
    yield ""
    cuts = list(found.stability[0].beyond)
    yield f"| run | come back by decoder | by activation | {' | '.join(f'{cut}: again' for cut in cuts)} |"
    yield "|---" * (3 + len(cuts)) + "|"
    for each in found.stability:
        activation = "" if each.share_by_activation is None else f"{each.share_by_activation:.1%}"
        again = [f"{each.beyond_again[cut]} of {each.beyond[cut]}" for cut in cuts]
        yield f"| {each.run} | {each.share_by_decoder:.1%} | {activation} | {' | '.join(again)} |"


def _runs(found: PairControls) -> Iterator[str]:
    yield "## Runs"
    yield ""
    yield "| control | what it is | latents | live | rows | FVE | L0 | dead |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in found.runs:
        yield (
            f"| {run.name} | {run.about} | {run.num_latents:,} | {run.num_live:,} | {run.num_rows:,} | {run.fve:.3f} | "
            f"{run.l0:.1f} | {run.dead_fraction:.1%} |"
        )


def _directions(found: PairControls) -> Iterator[str]:
    if found.first_tokens is not None:
        yield "## Mean difference on the first tokens"
        yield ""
        yield "| position | rows | length / mean length of a | promotes |"
        yield "|---|---|---|---|"
        tokens = found.first_tokens
        for place, position in enumerate(tokens.positions):
            said = "" if tokens.readings is None else _listed(tokens.readings[place].promoted)
            yield f"| {position} | {tokens.num_rows[place]:,} | {tokens.relative_lengths[place]:.3f} | {said} |"
    if found.components is not None:
        yield ""
        yield "## Components of the difference"
        yield ""
        yield "| share | promotes | largest on | smallest on |"
        yield "|---|---|---|---|"
        parts = found.components
        for place, share in enumerate(parts.shares):
            said = "" if parts.readings is None else _listed(parts.readings[place].promoted)
            ends = (parts.largest_positive[place], parts.largest_negative[place])
            yield f"| {share:.1%} | {said} | {' | '.join(map(_listed, ends))} |"


def _listed(tokens: tuple[str, ...]) -> str:
    return " ".join(f"`{_written(token)}`" for token in tokens[:8])


def _written(token: str) -> str:
    """A token as it can stand in a table: control characters by their number."""
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in token)
    return plain.replace("|", "\\|").replace("`", "'")


if __name__ == "__main__":
    main()
