"""Planted behaviours: does a crosscoder's best single latent find them, and do its norms say that they are new?

From one stream of activations of `base`, `plain` and `chat` this trains side by side, for every seed,

    chat-base, chat-plain     crosscoders of the real pairs
    null-base, null-plain     the same with a made-up partner x_b := x_a + N(mean, Cov(x_b − x_a))
    sae-base                  a sparse autoencoder of base alone

and reports, for every label, the best latent (chosen on half the documents, scored on the other against look-alikes
of the same role) with its relative norm beside the null's 0.1–99.9 % band, and how many latents lie beyond that band.

    python benchmarks/planted.py --out benchmarks/results            # about a quarter of an hour on two free cores
    python benchmarks/planted.py --quick --out /tmp/planted          # a minute: shows that it runs, proves nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
    NullPair,
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
from crosscoder.crosscoder import Crosscoder
from crosscoder.demo.files import data_path
from crosscoder.nonlinearities import BatchTopK
from crosscoder.sources import SourceSet
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal

PAIRS = {"chat-base": ("base", "chat"), "chat-plain": ("plain", "chat")}
NULLS = {"chat-base": "null-base", "chat-plain": "null-plain"}
BATCH_SIZE = 2048
CALIBRATION_BATCHES = 8
View = Callable[[Tensor, int], Tensor]
"""Rows of the stream (and the number of the first) to rows of one crosscoder's sources."""


@dataclass(frozen=True)
class Held:
    """Activations of the analysis set, kept in memory: an ActivationSource."""

    sources: SourceSet
    parts: Sequence[Batch]

    def contexts(self) -> Iterator[Batch]:
        """All of them, in text order."""
        return iter(self.parts)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Not shuffled; whole contexts, whatever the size."""
        while True:
            yield from self.parts

    def state_dict(self) -> State:
        """No state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to restore."""

    def seen(self, sources: SourceSet, view: View) -> Held:
        """The same contexts as one crosscoder sees them."""
        parts: list[Batch] = []
        first = 0
        for part in self.parts:
            parts.append(Batch(view(part.x, first), part.rows))
            first += len(part.x)
        return Held(sources, parts)


@dataclass
class Trained:
    """One crosscoder in training: what it is of, how it sees the stream's rows, its trainer."""

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
    stream, text = open_stream(options)
    members = prepare(stream, options)
    train(members, stream, options)
    held = Held(stream.sources, list(ActivationStream(stream.models, stream.sources, text).contexts()))
    result = assess(members, held, text, read_labels(options.data / "labels.jsonl"))
    result["about"] = about(options, seconds=time.monotonic() - start)
    report = as_markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planted.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (options.out / "planted.md").write_text(report, encoding="utf-8")
    print(report)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Do best single latents find what was planted?")
    parser.add_argument("--data", type=Path, default=data_path(), help="the pair: models, text, labels.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="directory for planted.json and planted.md")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--site", default="layers.3.resid_post")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-tokens", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one seed, 512 latents, 20,000 rows")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.latents, options.seeds, options.k = 20_000, 512, 1, 16
        options.held_out_tokens = 20_000
    return options


@dataclass(frozen=True)
class Stream:
    """The three models and the stream of their activations."""

    models: dict[str, StudiedModel]
    sources: SourceSet
    activations: ActivationStream


def open_stream(options: argparse.Namespace) -> tuple[Stream, AnalysisSet]:
    """Activations of base, plain and chat over books and dialogues, and the held-out set."""
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
        held_out=HeldOutConfig(fraction=0.1, num_tokens=options.held_out_tokens),
    )
    corpus = Corpus(config, models["chat"].tokenizer, seed=0)
    activations = ActivationStream(models, sources, corpus, buffer_bytes=min(400, options.rows // 500 + 20) * 10**6)
    return Stream(models, sources, activations), corpus.held_out()


def prepare(stream: Stream, options: argparse.Namespace) -> list[Trained]:
    """All crosscoders with their normalisers fitted on the first rows, untrained."""
    source, of = stream.activations, stream.sources
    keys = {alias: of.resolve(alias).key for alias in of.models}
    begin = source.state_dict()
    batches = source.batches(BATCH_SIZE)
    first = [next(batches).x for _ in range(max(4, min(50, options.rows // BATCH_SIZE // 4)))]
    source.load_state_dict(begin)
    measured = Held(of, [Batch(x) for x in first])
    members: list[Trained] = []
    for kind, (a, b) in PAIRS.items():
        null = NullPair(measured, a=a, b=b, num_rows=10**9)
        for seed in range(options.seeds):
            members.append(
                _member(kind, seed, of.subset([keys[a], keys[b]]), columns_of(of, [keys[a], keys[b]]), options)
            )
            made_up = NullPair(measured, a=a, b=b, difference=null.difference, seed=seed)
            members.append(_member(NULLS[kind], seed, made_up.sources, noisy(made_up), options))
    members += [
        _member("sae-base", seed, of.subset([keys["base"]]), columns_of(of, [keys["base"]]), options)
        for seed in range(options.seeds)
    ]
    for member in members:
        seen = (member.view(x, n * BATCH_SIZE) for n, x in enumerate(first))
        fitted = normaliser.fit(member.sources, seen)
        member.crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
    return members


def columns_of(sources: SourceSet, keys: Sequence[str]) -> tuple[View, View]:
    """The columns of some sources, in training and on held-out rows alike."""
    columns = torch.tensor(sources.columns(keys))
    return (lambda x, first: x[:, columns]), (lambda x, first: x[:, columns])


def noisy(null: NullPair) -> tuple[View, View]:
    """The null pair's rows; held-out rows get noise of their own."""
    return (
        lambda x, first: null.null_rows(x, first_row=first),
        lambda x, first: null.null_rows(x, first_row=first, stream="contexts"),
    )


def _member(kind: str, seed: int, sources: SourceSet, views: tuple[View, View], options: argparse.Namespace) -> Trained:
    cc = Crosscoder(acausal(sources, num_latents=options.latents), BatchTopK(options.k), seed=seed)
    config = TrainConfig(num_tokens=options.rows, batch_size=BATCH_SIZE, learning_rate=options.learning_rate)
    return Trained(kind, seed, sources, views[0], views[1], Trainer(cc, config))


def train(members: Sequence[Trained], stream: Stream, options: argparse.Namespace) -> None:
    """Every member sees the same rows in the same order; thresholds are calibrated on the last batches."""
    batches = stream.activations.batches(BATCH_SIZE)
    num_steps = max(1, options.rows // BATCH_SIZE)
    last: list[tuple[int, Tensor]] = []
    for step in range(num_steps):
        x, first = next(batches).x, step * BATCH_SIZE
        last = [*last, (first, x)][-CALIBRATION_BATCHES:]
        for member in members:
            member.trainer.check(member.trainer.step(member.view(x, first)))
        if step % max(1, num_steps // 20) == 0:
            print(f"step {step + 1:,} of {num_steps:,}, {len(members)} crosscoders", flush=True)
    for member in members:
        member.crosscoder.calibrate([member.view(x, first) for first, x in last])
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
        **{name: getattr(options, name) for name in ("rows", "latents", "k", "seeds", "site", "learning_rate")},
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The report."""
    facts = result["about"]
    lines = [f"# Planted behaviours and single latents, {facts['date']}", ""]
    lines += [" · ".join(f"{name} {value}" for name, value in facts.items() if name != "date"), ""]
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
    yield "| label | seed | tokens +/− | detector | AUROC, other half | F1 | relative norm | beyond the band |"
    yield "|---|---|---|---|---|---|---|---|"
    for seed, scores in pair["labels"].items():
        for label in scores["labels"]:
            yield from (_score_line(seed, label, score, band) for score in label["scores"])


def _score_line(seed: int, label: dict[str, Any], score: dict[str, Any], band: dict[str, Any]) -> str:
    norm = score["relative_norm"]
    place = "" if norm is None else "below" if norm < band["low"] else "above" if norm > band["high"] else "no"
    name = score["detector"] + ("" if score["latent"] is None else f" {score['latent']}")
    cells = (
        label["label"],
        seed,
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
