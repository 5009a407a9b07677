"""Same or independent directions across sources at the start: what says the null pair, and what says the real one?

From activations of the shipped `base` and `chat`, harvested once, this trains for both choices of `init.across_sources`
and every seed

    null      base, and a made-up partner x_b := x_a + N(mean, Cov(x_chat − x_base)): nothing structured differs
    pair      base and chat

with equal settings, and reports reconstruction, how many latents of the null the usual cut-offs call exclusive (all of
them falsely), the null's band of relative norms, and how many latents of the pair lie beyond it. Registered beforehand:
a choice is preferred when it calls fewer null latents exclusive at no cost in reconstruction (FVE within 0.005), and
leaves at least as many latents of the real pair beyond its own null's band.

    python benchmarks/initialisation.py                 # three seeds, about ten minutes on two cores
    python benchmarks/initialisation.py --quick         # shows that it runs, proves nothing
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import planted
import torch
from torch import Tensor

from crosscoder.analysis import CountsBeyond, counts_beyond, evaluate, latent_classes, null_band
from crosscoder.capture.null_pair import NullPair
from crosscoder.crosscoder import Crosscoder
from crosscoder.initialisation import Across
from crosscoder.nonlinearities import BatchTopK
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.json_numbers import json_text
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal

CUTS = ("default", "dfc")
CHOICES: tuple[Across, ...] = get_args(Across)


@dataclass(frozen=True)
class Cell:
    """One trained crosscoder: reconstruction, latents called exclusive by name of cut-offs, norms of live ones."""

    kind: str
    across: str
    seed: int
    fve: float
    dead_fraction: float
    exclusive: dict[str, int]
    cosine: float
    norms: Tensor


def main() -> None:
    """Train, compare, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    rows, held, _ = planted.harvest(options)
    print(f"harvested {len(rows.x):,} rows in {time.monotonic() - start:.0f} s", flush=True)
    cells = list(train_all(rows, held, options))
    result = {"format": "crosscoder.initialisation/1", **compare(cells)}
    result["about"] = planted.about(options, seconds=time.monotonic() - start)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "initialisation.json").write_text(json_text(result, indent=2) + "\n", encoding="utf-8")
    report = as_markdown(result)
    (options.out / "initialisation.md").write_text(report, encoding="utf-8")
    print(report)


def arguments() -> argparse.Namespace:
    """The command line: as planted.py's, with a smaller default size."""
    options = planted.arguments()
    if not options.quick:
        options.rows, options.latents = min(options.rows, 300_000), min(options.latents, 2048)
    return options


def train_all(rows: planted.TrainingRows, held: planted.Held, options: argparse.Namespace) -> Iterator[Cell]:
    """Every kind, choice and seed; all on the same rows in the same order."""
    of = rows.sources
    keys = [of.resolve(alias).key for alias in ("base", "chat")]
    pair = of.subset(keys)
    first = [x for _, x in rows.batches()][: max(4, min(100, len(rows.x) // planted.BATCH_SIZE // 4))]
    measured = NullPair(planted.Held(of, [planted.Batch(x) for x in first]), a="base", b="chat", num_rows=10**9)
    for seed in range(options.seeds):
        null = NullPair(planted.Held(of, []), a="base", b="chat", difference=measured.difference, seed=seed)
        views = {"null": planted.noisy(null, keys), "pair": planted.columns_of(of, keys)}
        for kind, (view, held_view) in views.items():
            fitted = normaliser.fit(pair, (view(x, i * len(x)) for i, x in enumerate(first)))
            for across in CHOICES:
                cc = Crosscoder(
                    acausal(pair, num_latents=options.latents),
                    BatchTopK(options.k),
                    seed=seed,
                    across_sources=across,
                )
                cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
                size = TrainConfig(
                    num_tokens=len(rows.x), batch_size=planted.BATCH_SIZE, learning_rate=options.learning_rate
                )
                member = planted.Trained(kind, seed, pair, view, held_view, Trainer(cc, size))
                planted.train(member, rows)
                yield measure(member, held, across)


def measure(member: planted.Trained, held: planted.Held, across: str) -> Cell:
    """One trained crosscoder on the held-out rows."""
    cc, (a, b) = member.crosscoder, member.sources.keys
    evaluation = evaluate(cc, held.seen(member.sources, member.held_view))
    named = {cuts: latent_classes(cc, a=a, b=b, cutoffs=cuts, density=evaluation.density) for cuts in CUTS}
    exclusive = {cuts: found.counts["a-only"] + found.counts["b-only"] for cuts, found in named.items()}
    live = evaluation.density > 0
    cosine = named["default"].cosine
    assert cosine is not None, "the two sources have one width"
    print(f"{member.kind}, {across}, seed {member.seed}: FVE {evaluation.fve:.4f}, exclusive {exclusive}", flush=True)
    return Cell(
        kind=member.kind,
        across=across,
        seed=member.seed,
        fve=evaluation.fve,
        dead_fraction=evaluation.dead_fraction,
        exclusive=exclusive,
        cosine=float(cosine[live].median()),
        norms=named["default"].relative_norm[live],
    )


def compare(cells: Sequence[Cell]) -> dict[str, Any]:
    """The cells, and for each choice its null's band with the counts of null and pair beyond it."""
    beyond: dict[str, Any] = {}
    for across in CHOICES:
        norms = {kind: [c.norms for c in cells if (c.kind, c.across) == (kind, across)] for kind in ("null", "pair")}
        band = null_band(norms["null"])
        counts: dict[str, CountsBeyond] = {kind: counts_beyond(band, found) for kind, found in norms.items()}
        beyond[across] = {"band": asdict(band), **{kind: asdict(count) for kind, count in counts.items()}}
    rows = [{name: value for name, value in vars(cell).items() if name != "norms"} for cell in cells]
    return {"crosscoders": rows, "beyond": beyond}


def as_markdown(result: dict[str, Any]) -> str:
    """The report."""
    facts = result["about"]
    lines = [f"# Initial directions across sources, {facts['date']}", ""]
    lines += [" · ".join(f"{name} {value}" for name, value in facts.items() if name != "date"), ""]
    lines += ["| of | across sources | seed | FVE | dead | median cosine | exclusive: .1/.9 | exclusive: dfc |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {c['kind']} | {c['across']} | {c['seed']} | {c['fve']:.4f} | {c['dead_fraction']:.1%} "
        f"| {c['cosine']:.3f} | {c['exclusive']['default']} | {c['exclusive']['dfc']} |"
        for c in result["crosscoders"]
    ]
    lines += ["", "Beyond the 0.1–99.9 % band of the null's relative norms, mean over seeds [95 %]:", ""]
    lines += ["| across sources | band | pair below | pair above | expected on each side |", "|---|---|---|---|---|"]
    for across, found in result["beyond"].items():
        band, pair = found["band"], found["pair"]
        cells = [f"{c['mean']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in (pair["below"], pair["above"])]
        lines.append(
            f"| {across} | {band['low']:.3f}–{band['high']:.3f} | {' | '.join(cells)} | {pair['expected']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
