"""What a crosscoder reaches on the shipped models: the pair at one layer, and all layers of `base` in one dictionary.

    python benchmarks/pair.py --out runs/benchmarks/pair

Each is an ordinary run with the demo's settings, evaluated on its held-out set. Prints a table and writes it, with the
versions and the machine, to report.md and report.json in the output directory. A finished run is not trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import crosscoder as xc
from crosscoder.demo.run import run_config
from crosscoder.training.config import RunConfig

TARGETS = "targets: FVE >= 0.93, L0 <= 40, cross-entropy recovered >= 0.98, never fire < 10 %"


@dataclass(frozen=True)
class Row:
    """One run's figures."""

    name: str
    seconds: float
    evaluation: xc.analysis.Evaluation

    def cells(self) -> list[str]:
        """The row of the table."""
        e = self.evaluation
        return [
            self.name,
            f"{e.fve:.4f}",
            f"{e.fve_mean_of_ratios:.4f}",
            f"{e.l0:.1f}",
            f"{100 * e.dead_fraction:.1f} %",
            _lowest(e.ce_recovered),
            _lowest(e.ce_recovered_mean),
            f"{self.seconds:.0f}",
        ]


HEAD = ["run", "FVE", "FVE, mean of ratios", "L0", "never fire", "CE recovered, zero", "CE recovered, mean", "seconds"]


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
    start = time.monotonic()
    result = xc.train(run)
    seconds = time.monotonic() - start
    return Row(name, seconds, xc.analysis.evaluate_run(result.path))


def report(rows: list[Row], out: Path) -> str:
    """Write the report's two files, and give its text."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [f"# Shipped pair, {time.strftime('%Y-%m-%d')}", "", machine, "", TARGETS, ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows))]
    text = "\n".join(lines) + "\n"
    content: dict[str, Any] = {
        "format": "crosscoder.benchmark/1",
        "machine": machine,
        "runs": {row.name: {"seconds": row.seconds, **row.evaluation.to_json()} for row in rows},
    }
    (out / "report.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
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


def _lowest(by_source: dict[str, float] | None) -> str:
    return "–" if not by_source else f"{min(by_source.values()):.4f}"


if __name__ == "__main__":
    main()
