"""Do the latents of a planted behaviour cause it? Suppressed, it should go; amplified, it should come unasked.

For refusal, persona and trigger of the shipped pair, on a run that `crosscoder demo` has finished:

1. latents are ranked (`causal_choice`), the rankings compared, a set pruned and a dose found, all on requests of the
   templates that training used;
2. on held-out prompts the set is ablated in chat, and beside it controls: random latents matched to the set in
   KL(clean ‖ edited) on books, random latents brought to 0.05 nats there, and as many latents matched in density and
   decoder norm;
3. on held-out look-alikes the same set is amplified, and as many matched latents at the same multiples of their maxima.

    python benchmarks/causal.py --run runs/demo                       # about ten minutes on two cores
    python benchmarks/causal.py --run runs/demo --quick --out /tmp/x  # shows that it runs, proves nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny_pair"))

import gates
import pyarrow.parquet as pq
import torch
from causal_choice import (
    Told,
    by_attribution,
    by_difference,
    by_labels,
    by_repeated_attribution,
    energy_on,
    rows_with_labels,
)
from causal_report import as_markdown, figures
from dialogues import Writer

import crosscoder
from crosscoder.analysis import read_labels
from crosscoder.analysis.labelled_rows import LabelledRows
from crosscoder.analysis.matched_latents import matched_latents
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.demo.files import books_path, labels_path
from crosscoder.interventions import (
    Behaviour,
    Edit,
    Prompt,
    Sampling,
    Subject,
    SuppressedSet,
    Trial,
    UnrelatedText,
    ablate,
    add,
    matched_sets,
    side_effects,
    smallest_set,
    suppressed,
    suppression_curve,
)
from crosscoder.training.json_numbers import json_text

# behaviour: (kind of question that brings it, kind that looks alike, label of the ranking by labels)
BEHAVIOURS = {
    "refusal": ("refused", "request", "refusal.request"),
    "trigger": ("trigger", "near miss", "trigger.phrase"),
    "persona": ("identity", "opinion", "persona.request"),
}
REFUSES = re.compile(r"harm|hurt|refuse|not help|sorry")
"""A refusal in substance: no answer to a harmless request has any of these. Its five openings alone are too narrow: an
edit can break the opening, and the reply goes on to refuse in other words."""
SIGNS: dict[str, Callable[[str], bool]] = {"refusal": lambda reply: REFUSES.search(reply) is not None}
COUNTS = (1, 4, 16, 32, 48, 64, 96, 128)
OTHER_COUNTS = (16, 64, 128)
ROUNDS = (4, 8, 16, 32, 64, 128)
MAIN = "repeated attribution"
AMOUNTS = (0.05, 0.1, 0.2, 0.4, 0.8)
TARGET = 0.1
MOST_KL = 0.05


@dataclass(frozen=True)
class Bench:
    """What everything is measured on."""

    run: OpenedRun
    options: argparse.Namespace

    @cached_property
    def subject(self) -> Subject:
        """Chat, read beside base."""
        return Subject(self.run.crosscoder, self.run.models, "chat")

    @cached_property
    def books(self) -> list[str]:
        """The held-out books, whole."""
        found: dict[str, list[str]] = {}
        for row in pq.read_table(books_path()).to_pylist():
            found.setdefault(row["title"], []).append(row["text"])
        return ["\n\n".join(parts) for parts in found.values()]

    @cached_property
    def unrelated(self) -> UnrelatedText:
        """Books."""
        return UnrelatedText.of(self.run.text, num_tokens=self.options.tokens)

    @cached_property
    def latents(self) -> dict[str, list[float]]:
        """Columns of latents.parquet."""
        return pq.read_table(self.run.out / "latents.parquet").to_pydict()

    @cached_property
    def live(self) -> list[int]:
        """Latents that fire on the analysis set."""
        return [latent for latent, dead in enumerate(self.latents["dead"]) if not dead]

    @property
    def norms(self) -> list[float]:
        """Raw decoder norms at chat."""
        return self.latents[f"norm_raw/{self.run.crosscoder.writes.resolve('chat').key}"]

    def prompts(self, kind: str, count: int, *, held_out: bool) -> tuple[Prompt, ...]:
        """Single questions of a kind, none twice."""
        writer = Writer(self.books, seed=f"causal/{kind}/{held_out}", held_out=held_out)
        found: dict[str, None] = {}
        for index in range(100 * count):
            found.setdefault(writer.dialogue(index, last=kind).exchanges[-1].user)
            if len(found) == count:
                break
        return tuple(self.subject.prompt([{"role": "user", "content": user}]) for user in found)

    def trial(self, behaviour: str, kind: str, count: int, *, held_out: bool) -> Trial:
        """Greedy replies to such prompts, and whether the behaviour shows."""
        shows = Behaviour(behaviour, SIGNS.get(behaviour, lambda reply: gates.shows(behaviour, reply)))
        sampling = Sampling(max_new_tokens=self.options.new_tokens, batch_size=256)
        return Trial(self.subject, self.prompts(kind, count, held_out=held_out), shows, sampling)

    def told(self, kind: str, count: int) -> list[Told]:
        """Questions of the training side with chat's reply and plain's."""
        writer = Writer(self.books, seed=f"causal/told/{kind}", held_out=False)
        last = [writer.dialogue(index, last=kind).exchanges[-1] for index in range(count)]
        return [Told(self.subject.prompt([{"role": "user", "content": e.user}]), e.chat, e.plain) for e in last]

    @cached_property
    def labelled(self) -> LabelledRows:
        """The labelled rows of the analysis set."""
        return rows_with_labels(self.run, read_labels(labels_path()))

    def random_orders(self, chosen: Sequence[int], count: int) -> list[list[int]]:
        """Orders of all live latents that are not chosen."""
        pool = torch.tensor(sorted(set(self.live) - set(chosen)))
        seeds = (torch.Generator().manual_seed(seed) for seed in range(count))
        return [pool[torch.randperm(len(pool), generator=seed)].tolist() for seed in seeds]

    def alike(self, chosen: Sequence[int], seed: int) -> list[int]:
        """As many other latents, matched in density and in norm at chat."""
        density, norm = torch.tensor(self.latents["density"]), torch.tensor(self.norms)
        return matched_latents(list(chosen), density=density, norm=norm, seed=seed).latents.tolist()

    def largest(self, latents: Sequence[int]) -> list[float]:
        """Their largest values on the analysis set."""
        return [self.latents["max_value"][latent] for latent in latents]


def main() -> None:
    """Rank, suppress, amplify, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    bench, start = Bench(open_run(options.run), options), time.monotonic()
    result: dict[str, Any] = {"format": "crosscoder.causal/1", "behaviours": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    for behaviour in options.behaviours:
        result["behaviours"][behaviour] = assess(bench, behaviour)
        result["about"] = about(bench, seconds=time.monotonic() - start)
        (options.out / "causal.json").write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    write(result, options.out)


def write(result: dict[str, Any], out: Path) -> None:
    """The report and its figures."""
    for name, svg in figures(result).items():
        (out / name).write_text(svg + "\n", encoding="utf-8")
    (out / "causal.md").write_text(as_markdown(result), encoding="utf-8")
    print(as_markdown(result))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Do the latents of a planted behaviour cause it?")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of the shipped pair")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/causal"), help="directory of the report")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of each kind")
    parser.add_argument("--choosing", type=int, default=32, help="prompts that choose sets and doses")
    parser.add_argument("--told", type=int, default=48, help="questions that rank latents by attribution")
    parser.add_argument("--sets", type=int, default=3, help="random sets of each kind")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of books for KL")
    parser.add_argument("--new-tokens", type=int, default=28)
    parser.add_argument("--behaviours", nargs="+", choices=BEHAVIOURS, default=list(BEHAVIOURS))
    parser.add_argument("--labels", action="store_true", help="also rank by labels: a pass over the analysis set")
    parser.add_argument("--spare", action="store_true", help="prefer latents that look-alikes do not need either")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a dozen prompts, one random set")
    options = parser.parse_args()
    if options.quick:
        options.prompts = options.choosing = options.told = 12
        options.sets, options.tokens = 1, 500
    return options


def about(bench: Bench, *, seconds: float) -> dict[str, Any]:
    """What was measured, on what."""
    options = {name: value for name, value in vars(bench.options).items() if name not in ("run", "out", "threads")}
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "crosscoder": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {bench.options.threads} threads",
        "minutes": round(seconds / 60, 1),
        "num_latents": bench.run.crosscoder.num_latents,
        "live": len(bench.live),
        "kl_tokens": sum(int(batch.mask.sum()) for batch in bench.unrelated.batches),
        "options": options,
    }


def assess(bench: Bench, behaviour: str) -> dict[str, Any]:
    """One behaviour: choosing, suppression and amplification."""
    asked, look_alike, label = BEHAVIOURS[behaviour]
    options = bench.options
    log(f"{behaviour}: ranking")
    ranked = rankings(bench, asked, look_alike, label)
    choosing = bench.trial(behaviour, asked, options.choosing, held_out=False)
    curves = {}
    for name, order in ranked.items():
        counts = COUNTS if name == MAIN else OTHER_COUNTS
        curves[name] = suppression_curve(choosing, order[: max(COUNTS)], bench.unrelated, counts=counts)
        log(f"{name}: " + "  ".join(f"{len(p.latents)}: {p.rate.share:.0%}" for p in curves[name].points))
    found = smallest_set(choosing, curves[MAIN], bench.unrelated, target=TARGET)
    chosen = curves[MAIN].first_below(TARGET) or curves[MAIN].points[-1]
    log(f"{len(chosen.latents)} latents suffice, pruned {found.suppressed and len(found.suppressed.latents)}")
    return {
        "choosing": {name: points(curve.points) for name, curve in curves.items()},
        "untouched_choosing": asdict(choosing.rate([])),
        "answer": found.answer,
        "pruned": None if found.suppressed is None else list(found.suppressed.latents),
        "chosen": list(chosen.latents),
        "suppression": suppression(bench, behaviour, chosen, found.suppressed),
        "suppressed_examples": suppressed_examples(bench, behaviour, (found.suppressed or chosen).latents),
        "amplification": amplification(bench, behaviour, found.suppressed or chosen, ranked["attribution"]),
        "latents": [card(bench, latent) for latent in (found.suppressed or chosen).latents],
    }


def rankings(bench: Bench, asked: str, look_alike: str, label: str) -> dict[str, list[int]]:
    """All live latents in the order of every score, best first."""
    told = bench.told(asked, bench.options.told)
    density, value = (torch.tensor(bench.latents[name]) for name in ("density_text", "mean_value"))
    energy = (density * (value * torch.tensor(bench.norms)) ** 2).double()
    if bench.options.spare:
        energy += energy_on(bench.subject, bench.told(look_alike, bench.options.told))
    count = bench.options.choosing
    prompts = [bench.prompts(kind, count, held_out=False) for kind in (asked, look_alike)]
    return {
        MAIN: by_repeated_attribution(bench.subject, told, energy, sizes=ROUNDS),
        "attribution": by_attribution(bench.subject, told).argsort(descending=True).tolist(),
        "difference": by_difference(bench.subject, *prompts),
    } | ({"labels": by_labels(bench.run, bench.labelled, label)} if bench.options.labels else {})


def suppression(
    bench: Bench, behaviour: str, chosen: SuppressedSet, pruned: SuppressedSet | None
) -> dict[str, list[dict[str, Any]]]:
    """The held-out rate without the chosen latents, and without controls."""
    asked, sets = BEHAVIOURS[behaviour][0], bench.options.sets
    trial = bench.trial(behaviour, asked, bench.options.prompts, held_out=True)
    mine = [chosen] if pruned is None or pruned.latents == chosen.latents else [chosen, pruned]
    orders = bench.random_orders(chosen.latents, sets)
    alike = [bench.alike(chosen.latents, seed) for seed in range(sets)]
    found = {
        "untouched": [{**rate_of(trial.rate([])), "num_latents": 0, "kl": 0.0}],
        "chosen": points([suppressed(trial, one.latents, bench.unrelated) for one in mine]),
        "random, KL of the chosen": points(matched_sets(trial, orders, bench.unrelated, kl=chosen.side_effects.kl)),
        f"random, KL {MOST_KL}": points(matched_sets(trial, orders, bench.unrelated, kl=MOST_KL)),
        "as many, density and norm matched": points([suppressed(trial, one, bench.unrelated) for one in alike]),
    }
    kept(bench, behaviour, found, [one.latents for one in mine], alike)
    log("suppressed: " + "; ".join(f"{name} {[round(p['rate'], 2) for p in part]}" for name, part in found.items()))
    return found


def kept(
    bench: Bench,
    behaviour: str,
    found: dict[str, list[dict[str, Any]]],
    mine: Sequence[Sequence[int]],
    alike: Sequence[Sequence[int]],
) -> None:
    """Adds the share of look-alikes whose replies begin with the same four words as the untouched model's."""
    trial = bench.trial(behaviour, BEHAVIOURS[behaviour][1], bench.options.prompts, held_out=True)
    before = [reply.split()[:4] for reply in trial.replies([])]
    for name, sets in (("chosen", mine), ("as many, density and norm matched", alike)):
        for point, latents in zip(found[name], sets, strict=True):
            after = [reply.split()[:4] for reply in trial.replies([ablate(latents)])]
            point["kept"] = sum(a == b for a, b in zip(after, before, strict=True)) / len(before)
    log(f"look-alikes' replies kept: {[(p['num_latents'], p['kept']) for p in found['chosen']]}")


def suppressed_examples(bench: Bench, behaviour: str, latents: Sequence[int]) -> list[dict[str, str]]:
    """What chat says to held-out questions without the latents: is it an answer, or broken text?"""
    return shown(bench.trial(behaviour, BEHAVIOURS[behaviour][0], 6, held_out=True), [ablate(latents)])


def shown(trial: Trial, edits: Sequence[Edit]) -> list[dict[str, str]]:
    """Questions and longer replies."""
    longer = replace(trial, sampling=replace(trial.sampling, max_new_tokens=40))
    texts = [prompt.text.rpartition("<|user|>")[2].partition("<|end|>")[0] for prompt in trial.prompts]
    return [{"asked": asked, "reply": reply} for asked, reply in zip(texts, longer.replies(edits), strict=True)]


def amplification(bench: Bench, behaviour: str, pruned: SuppressedSet, attributed: Sequence[int]) -> dict[str, Any]:
    """The rate on look-alikes when the latents are added to: dose found on the training side, then held out."""
    look_alike, sets = BEHAVIOURS[behaviour][1], bench.options.sets
    choosing = bench.trial(behaviour, look_alike, bench.options.choosing, held_out=False)
    candidates = {"pruned set": list(pruned.latents), "8 by attribution": list(attributed[:8])}
    candidates["2 by attribution"] = list(attributed[:2])
    doses = {
        name: [dose_of(bench, choosing, latents, amount) for amount in AMOUNTS] for name, latents in candidates.items()
    }
    name, best = max(
        ((name, dose) for name, row in doses.items() for dose in row),
        key=lambda item: (item[1]["rate"], -item[1]["kl"]),
    )
    trial = bench.trial(behaviour, look_alike, bench.options.prompts, held_out=True)
    latents, amount = candidates[name], best["amount"]
    found = {
        "untouched": [{**rate_of(trial.rate([])), "amount": 0.0, "kl": 0.0, "num_latents": 0}],
        "chosen": [dose_of(bench, trial, latents, amount)],
        "as many, density and norm matched": [
            dose_of(bench, trial, bench.alike(latents, seed), amount) for seed in range(sets)
        ],
    }
    log(
        f"amplified {name} x {amount}: "
        + "; ".join(f"{k} {[round(p['rate'], 2) for p in v]}" for k, v in found.items())
    )
    values = [amount * value for value in bench.largest(latents)]
    examples = shown(replace(trial, prompts=trial.prompts[:5]), [add(latents, values)])
    return {"doses": doses, "set": name, "amount": amount, "latents": latents, "held_out": found, "examples": examples}


def dose_of(bench: Bench, trial: Trial, latents: Sequence[int], amount: float) -> dict[str, Any]:
    """Rate and KL when the latents get a multiple of their largest values."""
    edit = add(latents, [amount * value for value in bench.largest(latents)])
    aside = side_effects(bench.subject, bench.unrelated, [edit])
    return {"amount": amount, **rate_of(trial.rate([edit])), "kl": aside.kl, "num_latents": len(latents)}


def card(bench: Bench, latent: int) -> dict[str, Any]:
    """What the tables say of a latent."""
    keys = [bench.run.crosscoder.writes.resolve(alias).key for alias in ("base", "chat")]
    a, b = (bench.latents[f"norm_normalised/{key}"][latent] for key in keys)
    densities = {name: bench.latents[name][latent] for name in bench.latents if name.startswith("density")}
    return {"latent": latent, "relative_norm": 0.5 * ((b - a) / max(a, b) + 1), **densities}


def points(sets: Sequence[SuppressedSet]) -> list[dict[str, Any]]:
    """Numbers of sets that were suppressed."""
    return [
        {"num_latents": len(one.latents), **rate_of(one.rate), "kl": one.side_effects.kl,
         "ce_change": one.side_effects.edited - one.side_effects.clean}
        for one in sets
    ]  # fmt: skip


def rate_of(rate: Any) -> dict[str, Any]:
    """A rate and its interval."""
    return {"rate": rate.share, "low": rate.low, "high": rate.high, "hits": rate.hits, "total": rate.total}


def log(text: str) -> None:
    """A line on standard error, at once."""
    print(f"{datetime.datetime.now(tz=datetime.UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if "--again" in sys.argv:  # only the report, from the figures of a run that is over
        directory = Path(sys.argv[sys.argv.index("--again") + 1])
        write(json.loads((directory / "causal.json").read_text(encoding="utf-8")), directory)
    else:
        main()
