"""What a crosscoder reaches on the shipped models: the pair at one layer, and all layers of `base` in one dictionary.

    python benchmarks/pair.py --out runs/benchmarks/pair

Each is an ordinary run with the demo's settings, evaluated on its held-out set. Prints a table and writes it, with the
versions and the machine, to report.md and report.json in the output directory. A finished run is not trained again;
its training time is read from its metrics.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import crosscoder as xc
from crosscoder.demo.run import run_config
from crosscoder.training.config import RunConfig
from crosscoder.training.json_numbers import json_text
from crosscoder.training.sinks import read_metrics

TARGETS = "targets: FVE >= 0.93, L0 <= 40, cross-entropy recovered >= 0.98 (zero and mean), never fire < 10 %"


@dataclass(frozen=True)
class Row:
    """One run's figures."""

    name: str
    k: int | None
    seconds: float
    evaluation: xc.analysis.Evaluation

    @property
    def missed(self) -> list[str]:
        """The targets that this run does not reach; a recovery that is undefined reaches none."""
        e = self.evaluation
        met = {
            "FVE": e.fve >= 0.93,
            "L0": e.l0 <= 40,
            "CE recovered": (e.ce_recovered_min or 0.0) >= 0.98,
            "never fire": e.dead_fraction < 0.1,
        }
        return [name for name, is_met in met.items() if not is_met]

    def cells(self) -> list[str]:
        """The row of the table."""
        e = self.evaluation
        return [
            self.name,
            f"{e.fve:.4f}",
            f"{e.fve_mean_of_ratios:.4f}",
            f"{e.l0:.1f} / {self.k or '–'}",
            f"{100 * e.dead_fraction:.1f} %",
            _lowest(e.ce_recovered),
            _lowest(e.ce_recovered_mean),
            f"{self.seconds:.0f}",
            f"not met: {', '.join(self.missed)}" if self.missed else "met",
        ]


HEAD = [
    "run",
    "FVE",
    "FVE, mean of ratios",
    "L0 / k",
    "never fire",
    "CE recovered, zero",
    "CE recovered, mean",
    "seconds of training",
    "targets",
]


def runs(out: Path) -> dict[str, RunConfig]:
    """The runs that are measured."""
    pair = run_config(out / "pair")
    layers = tuple(f"base/layers.{layer}.resid_post" for layer in range(6))
    models = {"base": pair.models["base"]}
    text = pair.text.model_copy(update={"tokenizer": "base"})
    six = pair.model_copy(update={"sources": layers, "models": models, "text": text, "out": str(out / "layers")})
    return {"pair, layer 3": pair, "base, six layers": six}


def measure(name: str, run: RunConfig) -> Row:
    """Train and evaluate one run."""
    result = xc.train(run)
    return Row(name, run.k, training_seconds(result.path), xc.analysis.evaluate_run(result.path))


def training_seconds(run: Path) -> float:
    """How long the updates took, harvesting included: rows over rows per second, record by record."""
    records = [record for record in read_metrics(run / "metrics.jsonl") if record.get("rows_per_second")]
    rows = [0.0, *(record["rows"] for record in records)]
    return sum((b - a) / record["rows_per_second"] for a, b, record in zip(rows, rows[1:], records, strict=False))


def report(rows: list[Row], out: Path) -> str:
    """Write the report's two files, and give its text."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [f"# Shipped pair, {time.strftime('%Y-%m-%d')}", "", machine, "", TARGETS, ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows))]
    text = "\n".join(lines) + "\n"
    content: dict[str, Any] = {
        "format": "crosscoder.benchmark/1",
        "machine": machine,
        "runs": {row.name: _numbers(row) for row in rows},
    }
    (out / "report.json").write_text(json_text(content, indent=2), encoding="utf-8")
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Measure all runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pair"), help="directory for runs and report")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out.mkdir(parents=True, exist_ok=True)
    print(report([measure(name, run) for name, run in runs(out).items()], out))


def _numbers(row: Row) -> dict[str, Any]:
    return {"seconds": row.seconds, "k": row.k, "missed": row.missed, **row.evaluation.to_json()}


def _lowest(by_source: dict[str, float]) -> str:
    values = by_source.values()
    return f"{min(values):.4f}" if values and all(map(math.isfinite, values)) else "–"


if __name__ == "__main__":
    main()
