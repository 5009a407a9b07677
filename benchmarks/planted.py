"""Planted behaviours: does a crosscoder's best single latent find them, and do its norms say that they are new?

From activations of `base`, `plain` and `chat`, harvested once and kept in memory, this trains for every seed

    chat-base, chat-plain     crosscoders of the real pairs
    null-base, null-plain     the same with a made-up partner x_b := x_a + N(mean, Cov(x_b − x_a))
    sae-base                  a sparse autoencoder of base alone

and reports, for every label, the best latent (chosen on half the documents, scored on the other against look-alikes
of the same role) with its relative norm beside the null's 0.1–99.9 % band, and how many latents lie beyond that band.

    python benchmarks/planted.py                            # three seeds; fewer with --seeds, shorter with --rows
    python benchmarks/planted.py --quick --out /tmp/planted # shows that it runs, proves nothing
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import crosscoder
from crosscoder.activations import Batch, State
from crosscoder.analysis import (
    Band,
    CountsBeyond,
    LabelScores,
    LabelSpan,
    counts_beyond,
    evaluate,
    label_scores,
    latent_classes,
    null_band,
    read_labels,
)
from crosscoder.capture import (
    ActivationStream,
    AnalysisSet,
    Corpus,
    DatasetConfig,
    HeldOutConfig,
    ModelConfig,
    StudiedModel,
    TextConfig,
)
from crosscoder.capture.null_pair import NullPair
from crosscoder.crosscoder import Crosscoder
from crosscoder.demo.files import data_path
from crosscoder.nonlinearities import BatchTopK
from crosscoder.sources import SourceSet
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.json_numbers import json_text
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal

SETTINGS = ("rows", "latents", "k", "seeds", "site", "learning_rate", "held_out_fraction", "held_out_tokens")
PAIRS = {"chat-base": ("base", "chat"), "chat-plain": ("plain", "chat")}
NULLS = {"chat-base": "null-base", "chat-plain": "null-plain"}
BATCH_SIZE = 1024
CALIBRATION_BATCHES = 16
HARVEST_BYTES = 100_000_000
SEEDS = (
    "Seeds vary the initial weights and the null's noise. The rows, their order and the split into training and "
    "held-out documents are the same for all: intervals over seeds say nothing about other text."
)
View = Callable[[Tensor, int], Tensor]
"""Rows of all sources (and the number of the first) to rows of one crosscoder's sources."""


@dataclass(frozen=True)
class Held:
    """Rows kept in memory (bfloat16) as one crosscoder sees them: an ActivationSource."""

    sources: SourceSet
    parts: Sequence[Batch]
    view: View = lambda x, first: x

    def contexts(self) -> Iterator[Batch]:
        """All of them, in their order."""
        first = 0
        for part in self.parts:
            yield Batch(self.view(part.x.float(), first), part.rows)
            first += len(part.x)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Not shuffled; parts as they are, whatever the size."""
        while True:
            yield from self.contexts()

    def state_dict(self) -> State:
        """No state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to restore."""

    def seen(self, sources: SourceSet, view: View) -> Held:
        """The same rows as another crosscoder sees them."""
        return Held(sources, self.parts, view)


@dataclass
class Trained:
    """One crosscoder in training: what it is of, how it sees the rows, its trainer."""

    kind: str
    seed: int
    sources: SourceSet
    view: View
    held_view: View
    trainer: Trainer

    @property
    def crosscoder(self) -> Crosscoder:
        """The crosscoder."""
        return self.trainer.crosscoder


def main() -> None:
    """Train, score, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    rows, held, text = harvest(options)
    print(f"harvested {len(rows.x):,} rows in {time.monotonic() - start:.0f} s", flush=True)
    members = prepare(rows, options)
    for member in members:
        train(member, rows)
        print(f"trained {member.kind}, seed {member.seed}: {time.monotonic() - start:.0f} s", flush=True)
    result = assess(members, held, text, read_labels(options.data / "labels.jsonl"))
    result["about"] = about(options, seconds=time.monotonic() - start)
    report = as_markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planted.json").write_text(json_text(result, indent=2) + "\n", encoding="utf-8")
    (options.out / "planted.md").write_text(report, encoding="utf-8")
    print(report)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Do best single latents find what was planted?")
    parser.add_argument("--data", type=Path, default=data_path(), help="the pair: models, text, labels.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/planted"), help="directory of the report")
    parser.add_argument("--rows", type=int, default=600_000, help="rows that every crosscoder is trained on, once")
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=38)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--site", default="layers.3.resid_post")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out-fraction", type=float, default=0.3, help="share of the documents never trained on")
    parser.add_argument("--held-out-tokens", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one seed, 512 latents, 20,000 rows")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.latents, options.seeds, options.k = 20_000, 512, 1, 16
        options.held_out_tokens = 20_000
    return options


@dataclass(frozen=True)
class TrainingRows:
    """Rows of all sources in the order in which every crosscoder sees them, in bfloat16."""

    sources: SourceSet
    x: Tensor

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row of every whole batch, and its rows."""
        for first in range(0, len(self.x) - BATCH_SIZE + 1, BATCH_SIZE):
            yield first, self.x[first : first + BATCH_SIZE].float()


def harvest(options: argparse.Namespace) -> tuple[TrainingRows, Held, AnalysisSet]:
    """Activations of base, plain and chat over books and dialogues: training rows, and those of the held-out set."""
    aliases = ("base", "plain", "chat")
    models = {alias: StudiedModel.load(alias, ModelConfig(path=str(options.data / alias))) for alias in aliases}
    sources = SourceSet(model.source(options.site) for model in models.values())
    config = TextConfig(
        tokenizer="chat",
        context_length=256,
        packing="document",
        mix=(
            DatasetConfig(dataset=str(options.data / "books.parquet"), weight=0.6),
            DatasetConfig(dataset=str(options.data / "dialogues.parquet"), column="messages", chat=True, weight=0.4),
        ),
        held_out=HeldOutConfig(fraction=options.held_out_fraction, num_tokens=options.held_out_tokens),
    )
    corpus = Corpus(config, models["chat"].tokenizer, seed=0)
    text = corpus.held_out()
    batches = ActivationStream(models, sources, corpus, buffer_bytes=HARVEST_BYTES).batches(BATCH_SIZE)
    x = torch.empty(max(1, options.rows // BATCH_SIZE) * BATCH_SIZE, sources.width, dtype=torch.bfloat16)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the buffer mixes only its own fill
    for places in order.split(BATCH_SIZE):
        x[places] = next(batches).x.bfloat16()
    contexts = ActivationStream(models, sources, text, buffer_bytes=HARVEST_BYTES).contexts()
    held = Held(sources, [Batch(part.x.bfloat16(), part.rows) for part in contexts])
    return TrainingRows(sources, x), held, text


def prepare(rows: TrainingRows, options: argparse.Namespace) -> list[Trained]:
    """All crosscoders with their normalisers fitted on the first rows, untrained."""
    of = rows.sources
    keys = {alias: of.resolve(alias).key for alias in of.models}
    first = list(islice(rows.batches(), max(4, min(100, len(rows.x) // BATCH_SIZE // 4))))
    measured = Held(of, [Batch(x) for _, x in first])
    members: list[Trained] = []
    for kind, (a, b) in PAIRS.items():
        null = NullPair(measured, a=a, b=b, num_rows=10**9)
        for seed in range(options.seeds):
            members.append(
                _member(kind, seed, of.subset([keys[a], keys[b]]), columns_of(of, [keys[a], keys[b]]), options)
            )
            made_up = NullPair(measured, a=a, b=b, difference=null.difference, seed=seed)
            pair = [keys[a], keys[b]]
            members.append(_member(NULLS[kind], seed, of.subset(pair), noisy(made_up, pair), options))
    members += [
        _member("sae-base", seed, of.subset([keys["base"]]), columns_of(of, [keys["base"]]), options)
        for seed in range(options.seeds)
    ]
    for member in members:
        seen = (member.view(x, number) for number, x in first)
        fitted = normaliser.fit(member.sources, seen)
        member.crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
    return members


def columns_of(sources: SourceSet, keys: Sequence[str]) -> tuple[View, View]:
    """The columns of some sources, in training and on held-out rows alike."""
    columns = torch.tensor(sources.columns(keys))
    return (lambda x, first: x[:, columns]), (lambda x, first: x[:, columns])


def noisy(null: NullPair, keys: Sequence[str]) -> tuple[View, View]:
    """The null pair's rows at its two sources; held-out rows get noise of their own."""
    columns = torch.tensor(null.sources.columns(keys))
    return (
        lambda x, first: null.null_rows(x, first_row=first)[:, columns],
        lambda x, first: null.null_rows(x, first_row=first, stream="contexts")[:, columns],
    )


def _member(kind: str, seed: int, sources: SourceSet, views: tuple[View, View], options: argparse.Namespace) -> Trained:
    cc = Crosscoder(acausal(sources, num_latents=options.latents), BatchTopK(options.k), seed=seed)
    config = TrainConfig(
        num_tokens=max(BATCH_SIZE, options.rows), batch_size=BATCH_SIZE, learning_rate=options.learning_rate
    )
    return Trained(kind, seed, sources, views[0], views[1], Trainer(cc, config))


def train(member: Trained, rows: TrainingRows) -> None:
    """One pass over the rows, which all crosscoders see in the same order; calibrated on the last batches."""
    last: deque[Tensor] = deque(maxlen=CALIBRATION_BATCHES)
    for first, x in rows.batches():
        last.append(member.view(x, first))
        member.trainer.check(member.trainer.step(last[-1]))
    member.crosscoder.calibrate(list(last))
    member.crosscoder.eval()


def assess(members: Sequence[Trained], held: Held, text: AnalysisSet, labels: Sequence[LabelSpan]) -> dict[str, Any]:
    """Numbers of every crosscoder, and for each pair its labels, its null's band and the counts beyond."""
    norms: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for member in members:
        seen = held.seen(member.sources, member.held_view)
        evaluation = evaluate(member.crosscoder, seen)
        numbers = {"fve": evaluation.fve, "l0": evaluation.l0, "dead_fraction": evaluation.dead_fraction}
        rows.append({"kind": member.kind, "seed": member.seed} | numbers)
        if len(member.sources) == 2:
            a, b = member.sources.keys
            found = latent_classes(member.crosscoder, a=a, b=b).relative_norm
            norms.setdefault(member.kind, []).append(found[(evaluation.density > 0).to(found.device)])
        print(f"evaluated {member.kind}, seed {member.seed}: FVE {evaluation.fve:.3f}", flush=True)
    baselines = {member.seed: member.crosscoder for member in members if member.kind == "sae-base"}
    pairs = [_assess_pair(kind, members, held, text, labels=labels, norms=norms, baselines=baselines) for kind in PAIRS]
    return {"format": "crosscoder.planted/1", "crosscoders": rows, "pairs": pairs}


def _assess_pair(
    kind: str,
    members: Sequence[Trained],
    held: Held,
    text: AnalysisSet,
    *,
    labels: Sequence[LabelSpan],
    norms: dict[str, list[Tensor]],
    baselines: dict[int, Crosscoder],
) -> dict[str, Any]:
    a, b = PAIRS[kind]
    band: Band = null_band(norms[NULLS[kind]])
    beyond: dict[str, CountsBeyond] = {name: counts_beyond(band, norms[name]) for name in (kind, NULLS[kind])}
    scores: dict[int, LabelScores] = {}
    for member in (member for member in members if member.kind == kind):
        seen = held.seen(member.sources, member.held_view)
        baseline = baselines[member.seed] if a == "base" else None
        scores[member.seed] = label_scores(member.crosscoder, seen, text, labels=labels, a=a, b=b, baseline=baseline)
    return {
        "pair": kind,
        "band": asdict(band),
        "beyond": {name: asdict(count) for name, count in beyond.items()},
        "labels": {seed: score.to_json() for seed, score in scores.items()},
    }


def about(options: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """What made these numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} threads",
        "seconds": round(seconds),
        **{name: getattr(options, name) for name in SETTINGS},
        "batch_size": BATCH_SIZE,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The report."""
    facts = result["about"]
    lines = [f"# Planted behaviours and single latents, {facts['date']}", ""]
    lines += [" · ".join(f"{name} {value}" for name, value in facts.items() if name != "date"), ""]
    lines += [SEEDS, ""]
    lines += ["| crosscoder | seed | FVE | L0 | dead |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['kind']} | {r['seed']} | {r['fve']:.3f} | {r['l0']:.1f} | {r['dead_fraction']:.1%} |"
        for r in result["crosscoders"]
    ]
    for pair in result["pairs"]:
        lines += ["", *_pair_lines(pair)]
    return "\n".join(lines) + "\n"


def _pair_lines(pair: dict[str, Any]) -> Iterator[str]:
    band = pair["band"]
    yield f"## {pair['pair']}"
    yield ""
    yield (
        f"Null's band of relative norms (0.1–99.9 %, {band['num_latents']:,} live latents): "
        f"{band['low']:.3f} to {band['high']:.3f}. Latents beyond it, mean over seeds with 95 % intervals "
        "(resampling seeds and latents):"
    )
    yield ""
    yield "| crosscoder | below | above | expected on each side |"
    yield "|---|---|---|---|"
    for name, count in pair["beyond"].items():
        yield f"| {name} | {_count(count['below'])} | {_count(count['above'])} | {count['expected']:.1f} |"
    yield ""
    yield from _documents(pair)
    yield "| label | seed | documents | tokens +/− | detector | AUROC, other half | F1 | relative norm | beyond |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for seed, scores in pair["labels"].items():
        for label in scores["labels"]:
            yield from (_score_line(seed, label, score, band) for score in label["scores"])


def _documents(pair: dict[str, Any]) -> Iterator[str]:
    scores = next(iter(pair["labels"].values()))
    yield (
        f"{scores['num_documents']:,} labelled documents are held out; {scores['num_absent']:,} others play no part. "
        "`documents` are those of the scoring half, where the behaviour acts or its look-alike stands."
    )
    yield ""


def _score_line(seed: int, label: dict[str, Any], score: dict[str, Any], band: dict[str, Any]) -> str:
    norm = score["relative_norm"]
    place = "" if norm is None else "below" if norm < band["low"] else "above" if norm > band["high"] else "no"
    name = score["detector"] + ("" if score["latent"] is None else f" {score['latent']}")
    cells = (
        label["label"],
        seed,
        label["num_documents"],
        f"{label['num_positive']}/{label['num_negative']}",
        name,
        f"{score['auroc']:.3f} [{score['auroc_low']:.3f}, {score['auroc_high']:.3f}]",
        f"{score['f1']:.2f}",
        "" if norm is None else f"{norm:.3f}",
        place,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _count(count: dict[str, float]) -> str:
    return f"{count['mean']:.1f} [{count['low']:.1f}, {count['high']:.1f}]"


if __name__ == "__main__":
    main()
