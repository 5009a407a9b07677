"""Checkpoints of one fine-tune as sources: when do the latents of a planted behaviour come, and when the behaviour?

The shipped `base` is tuned into a small `chat` (examples/tiny_pair/finetune.py: same loss, optimisers and telling, far
fewer steps) and saved on the way. One crosscoder reads and writes layer 3 of all checkpoints. For every planted
behaviour the best latent is chosen by AUROC on half of the labelled documents; beside its emergence stands how much
more likely each checkpoint finds the planted replies to held-out questions than the plain ones, and what the same count
says of all live latents.

    OMP_NUM_THREADS=1 python benchmarks/emergence.py --out runs/benchmarks/emergence
    python benchmarks/emergence.py --report reports/name      # also writes name.md, name.json and name.svg
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import crosscoder as xc
from crosscoder.analysis import plots
from crosscoder.analysis.label_scores import LabelScores, label_scores
from crosscoder.analysis.labels import read_labels
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.capture.models import ModelConfig
from crosscoder.demo.files import books_path, labels_path, model_path
from crosscoder.demo.run import run_config
from crosscoder.training.config import AcausalConfig, BatchTopKConfig, RunConfig
from crosscoder.training.json_numbers import json_text

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny_pair"
sys.path.append(str(EXAMPLE))

from corpus import encode_books  # noqa: E402 (lies in the example)
from dialogues import Dialogue, Writer  # noqa: E402
from finetune import BOOK_WEIGHT, batches, encode_dialogue, padded, weighted_loss  # noqa: E402
from pretrain import linear_schedule, next_token_loss, optimisers, update, windows  # noqa: E402

SITE = "layers.3.resid_post"
NUM_LATENTS = 512
SHORT = 500
"""Fewer updates than this leave norms near where they started."""
NOTES = """\
A difference of log-probabilities depends on the lengths of the two replies: read a row from left to right, not its
size. The curves: `.svg` beside this page."""
TOO_SHORT = """\
Latents start with the same direction and norm at every source (decision 16). In so few updates norms hardly leave that
start, and *steady* is then no finding, whatever the replies do. Longer: `--steps 400 --rows 2000000`."""
BEHAVIOURS = ("refusal", "persona", "trigger")
RATES = [0.007, 1.5e-3]
COLOURS = ("a", "b", "shared")


def saved_steps(num_steps: int) -> tuple[int, ...]:
    """The steps that are sources: the start, and about a tenth, a third, two thirds and the whole."""
    return (0, *sorted({max(1, round(num_steps * part)) for part in (0.1, 0.33, 0.66, 1.0)}))


def alias(step: int) -> str:
    """What a checkpoint is called in the run."""
    return f"step{step:04d}"


def tune(out: Path, *, num_steps: int, batch_size: int, seed: int) -> None:
    """Tune base on dialogues as chat tells them, and save it at `saved_steps`; what is there is not made again."""
    if all((out / alias(step) / "config.json").exists() for step in saved_steps(num_steps)):
        return
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_path("chat"))
    model = LlamaForCausalLM.from_pretrained(model_path("base"), dtype=torch.float32)
    books = shipped_books()[:4]
    writer = Writer([book["text"] for book in books], seed=f"training/{seed}", held_out=False)
    told = [writer.dialogue(index) for index in range(num_steps * batch_size)]
    rows = windows(encode_books(tokenizer, books), bos=special(tokenizer.bos_token_id), seed=seed + 1)
    opts = optimisers(model, muon_lr=RATES[0], adam_lr=RATES[1])
    save(model, tokenizer, out / alias(0))
    for step, batch in enumerate(batches(told, batch_size=batch_size, seed=seed)):
        encoded = [encode_dialogue(tokenizer, dialogue.messages("chat")) for dialogue in batch]
        ids, weights = padded(encoded, pad=special(tokenizer.pad_token_id))
        book = torch.from_numpy(rows[step % len(rows)][None].astype(np.int64))
        loss = weighted_loss(model.train(), ids, weights) + BOOK_WEIGHT * next_token_loss(model, book)
        update(model, opts, loss, factor=linear_schedule(step, num_steps, warmup=10), rates=RATES)
        if step + 1 in saved_steps(num_steps):
            save(model, tokenizer, out / alias(step + 1))


def special(token: object) -> int:
    """The id of a special token that the shipped tokenizer has."""
    assert isinstance(token, int)
    return token


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """A Hugging Face directory, in fp32."""
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)


def shipped_books() -> list[dict[str, str]]:
    """The shipped books, whole."""
    texts: dict[str, list[str]] = {}
    for row in pq.read_table(books_path()).to_pylist():
        texts.setdefault(row["title"], []).append(row["text"])
    return [{"title": title, "text": "\n\n".join(parts)} for title, parts in sorted(texts.items())]


def preference(models: list[LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, *, count: int) -> dict[str, list]:
    """By behaviour and checkpoint: mean over questions of log p(planted reply) − log p(plain reply), in nats."""
    writer = Writer([book["text"] for book in shipped_books()[4:]], seed="gates/0", held_out=True)
    found: dict[str, list] = {}
    for behaviour in BEHAVIOURS:
        exchanges, index = [], 0
        while len(exchanges) < count and index < 100 * count:
            told = writer.dialogue(index).exchanges
            exchanges += [one for one in told if one.behaviour == behaviour and one.acts]
            index += 1
        dialogues = [Dialogue(None, (exchange,)) for exchange in exchanges[:count]]
        found[behaviour] = [mean_preference(model, tokenizer, dialogues) for model in models]
    return found


@torch.no_grad()
def mean_preference(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogues: list[Dialogue]) -> float:
    """log p(chat's reply) − log p(plain's reply), mean over dialogues of one exchange."""
    means = []
    for telling in ("chat", "plain"):
        encoded = [encode_dialogue(tokenizer, dialogue.messages(telling)) for dialogue in dialogues]
        ids, weights = padded(encoded, pad=special(tokenizer.pad_token_id))
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        said = logits.gather(2, ids[:, 1:, None]).squeeze(2)
        means.append(float((said * (weights[:, 1:] == 1)).sum() / len(dialogues)))
    return means[0] - means[1]


def config(out: Path, steps: tuple[int, ...], *, num_tokens: int) -> RunConfig:
    """The demo's run over the checkpoints, with fewer latents and rows."""
    names = [alias(step) for step in steps]
    demo = run_config(out / "run")
    held_out = demo.text.held_out.model_copy(update={"num_tokens": 40_000})
    return demo.model_copy(
        update={
            "models": {name: ModelConfig(path=str((out / name).resolve())) for name in names},
            "sources": tuple(f"{name}/{SITE}" for name in names),
            "text": demo.text.model_copy(update={"tokenizer": names[-1], "held_out": held_out}),
            "wiring": AcausalConfig(num_latents=NUM_LATENTS),
            "nonlinearity": BatchTopKConfig(k=24),
            "normaliser": demo.normaliser.model_copy(update={"num_tokens": 30_000}),
            "train": demo.train.model_copy(update={"num_tokens": num_tokens}),
        }
    )


def labelled(run: OpenedRun) -> LabelScores:
    """The best latent of every label."""
    first, last = run.crosscoder.writes.keys[0], run.crosscoder.writes.keys[-1]
    return label_scores(run.crosscoder, run.activations(), run.text, labels=read_labels(labels_path()), a=first, b=last)


def measure(out: Path, steps: tuple[int, ...], *, num_tokens: int, count: int) -> dict[str, Any]:
    """Train over the checkpoints, and everything that the report says."""
    start = time.monotonic()
    path = xc.train(config(out, steps, num_tokens=num_tokens)).path
    run = open_run(path)
    evaluation = xc.analysis.evaluate(run.crosscoder, run.activations())
    found = xc.analysis.emergence(run.crosscoder, density=evaluation.density)
    against = xc.analysis.one_against_all(run.crosscoder)
    models = [LlamaForCausalLM.from_pretrained(out / alias(step), dtype=torch.float32).eval() for step in steps]
    rows = [
        {
            "label": label.label,
            "latent": best.latent,
            "auroc": best.auroc,
            "interval": [best.auroc_low, best.auroc_high],
            **found.table().slice(best.latent, 1).select(["emergence_class", "emergence"]).to_pylist()[0],
            "profile": found.profile[best.latent].tolist(),
            "turn": found.turn[best.latent].tolist(),
            "share": against.share[best.latent].tolist(),
        }
        for label in labelled(run).labels
        if (best := label.best_latent) is not None and best.latent is not None
    ]
    tokenizer = run.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return {
        "format": "crosscoder.benchmark/1",
        "date": datetime.date.today().isoformat(),
        "version": xc.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "steps": list(steps),
        "updates": run.config.train.num_steps,
        "fve": evaluation.fve,
        "fve_per_source": dict(evaluation.fve_per_source),
        "l0": evaluation.l0,
        "emergence": found.to_json(),
        "one_against_all": against.to_json(),
        "labels": rows,
        "preference": preference(models, tokenizer, count=count),
        "seconds": round(time.monotonic() - start),
    }


def report(found: dict[str, Any], command: str) -> str:
    """The figures as a page of Markdown."""
    steps, curve = found["steps"], found["emergence"]
    head = " | ".join(f"step {step}" for step in steps)
    rule = "|---" * (len(steps) + 1) + "|"
    counted = {"present": "num_present", "first present": "num_emerged", "no longer present": "num_declined"}
    table = [f"| live latents | {head} |", rule]
    table += [f"| {name} | {' | '.join(map(str, curve[key]))} |" for name, key in counted.items()]
    replies = [f"| log p(planted) − log p(plain), nats | {head} |", rule]
    replies += [f"| {name} | {_row(values, '.1f')} |" for name, values in found["preference"].items()]
    labels = [f"| label | latent | AUROC | class | emergence | {head} |", "|---" * (len(steps) + 5) + "|"]
    for row in found["labels"]:
        auroc = "{:.2f} ({:.2f}–{:.2f})".format(row["auroc"], *row["interval"])
        place = str(row["emergence"]).split("/")[0]
        cells = (row["label"], str(row["latent"]), auroc, row["emergence_class"], place, _row(row["profile"], ".2f"))
        labels.append(f"| {' | '.join(cells)} |")
    classes = ", ".join(f"{name} {count}" for name, count in curve["classes"].items())
    turns = " → ".join("–" if turn is None else f"{turn:.3f}" for turn in curve["median_turn"])
    by_source = ", ".join(f"{value:.3f}" for value in found["fve_per_source"].values())
    parts = [
        f"# Emergence over checkpoints, {found['date']}",
        f"`{command}`; crosscoder {found['version']}, {found['machine']}; {found['seconds']} s after the tuning.",
        f"{found['updates']} updates; FVE {found['fve']:.3f} ({by_source} by "
        f"checkpoint), L0 {found['l0']:.1f}. Classes of {NUM_LATENTS} latents: {classes}. Median cosine of a latent's "
        f"directions from each checkpoint to the next: {turns}.",
        "\n".join(table),
        "When the behaviour comes, on held-out questions:",
        "\n".join(replies),
        "The best latent of every label, and its norm at each checkpoint as a share of its largest:",
        "\n".join(labels),
        NOTES,
        *([TOO_SHORT] if found["updates"] < SHORT else []),
    ]
    return "\n\n".join(parts) + "\n"


def _row(values: list[float], kind: str) -> str:
    return " | ".join(format(value, kind) for value in values)


def plot(found: dict[str, Any]) -> str:
    """Norm curves of the best latents, by behaviour."""
    steps = [float(step) for step in found["steps"]]
    lines = [
        plots.Curve(COLOURS[number], steps, row["profile"])
        for number, behaviour in enumerate(BEHAVIOURS)
        for row in found["labels"]
        if row["label"].startswith(behaviour)
    ]
    ticks = {step: f"{step:.0f}" for step in steps}
    title = "Norms of the latents of planted behaviours, as a share of the largest"
    return plots.curves(lines, x_ticks=ticks, labels=("steps of tuning", "norm"), title=title, top=1.0)


def main() -> None:
    """Tune, train, measure, report."""
    parser = argparse.ArgumentParser(description="Emergence of planted behaviours over checkpoints of a fine-tune.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/emergence"))
    parser.add_argument("--report", type=Path, default=None, help="path without suffix for the report's files")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rows", type=int, default=60_000, help="rows to train the crosscoder on")
    parser.add_argument("--questions", type=int, default=12, help="held-out questions a behaviour")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = saved_steps(options.steps)
    tune(options.out, num_steps=options.steps, batch_size=options.batch, seed=0)
    found = measure(options.out, steps, num_tokens=options.rows, count=options.questions)
    target = options.report or options.out / "report"
    command = f"python benchmarks/emergence.py --steps {options.steps} --batch {options.batch} --rows {options.rows}"
    target.with_suffix(".json").write_text(json_text(found, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report(found, command), encoding="utf-8")
    target.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
    print(report(found, command))


if __name__ == "__main__":
    main()
