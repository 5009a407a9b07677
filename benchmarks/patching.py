"""KL patching on a run of the shipped pair: which ranking of latents brings the other model's predictions back?

    python benchmarks/patching.py                           # runs/demo, from `crosscoder demo`; minutes on one thread
    python benchmarks/patching.py --run PATH --quick        # shows that it runs, proves nothing

Rankings of the latents that fire at least 20 times on the analysis set, best first:

    norm          relative norm: b's alone first
    scaling       sum of the ranks under ν of error and ν of reconstruction (latents with both from −0.1 to 2)
    rank sum      sum of the ranks under norm and scaling
    moved         E[f] ‖d^b − d^a‖ in raw space: what moves a's activations most, whoever it belongs to

beside random sets of the same latents, and the top half of each ranking's first 4 % against its bottom half. Writes
patching.md, patching.json and two plots, under today's date, into --out.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import crosscoder
from crosscoder.analysis import latent_classes, latent_scaling
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.analysis.tables import read_table
from crosscoder.interventions import (
    Condition,
    Estimate,
    PatchingCurves,
    PatchingPlan,
    patching,
    rank_sum,
    ranked,
)
from crosscoder.training.json_numbers import json_text

LEAST_ACTIVE = 20
NU = (-0.1, 2.0)
GROUPS = ("all", "first 9")
PUBLISHED = {
    ("reference", "none"): "0.482 / 1.69 nats",
    ("reference", "latents"): "59 % / 78 %",
    ("reference", "error"): "– / about 45 % of the gap",
    ("tokens", "template"): "50 % / 70 % (0.239 / 0.507 nats)",
}
PUBLISHED_HALVES = "BatchTopK: 52 % against 45 % of the gap (all), 50 % against 6 % (first 9); L1: no difference (all)"
COLOURS = {"norm": "#0b7285", "scaling": "#e67700", "rank sum": "#862e9c", "moved": "#5c940d", "random": "#868e96"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 58, 90, 30, 46


def rankings(run: OpenedRun, a: str, b: str) -> dict[str, Tensor]:
    """Latents that fire often enough, by each score."""
    cc = run.crosscoder
    scaling = latent_scaling(cc, run.activations(), a=a, b=b, bootstrap=None)
    alive = (scaling.num_active.cpu() >= LEAST_ACTIVE).nonzero().squeeze(1)
    norm = ranked(latent_classes(cc, a=a, b=b).relative_norm, among=alive)
    nus = [nu.cpu() for nu in (scaling.nu_error, scaling.nu_reconstruction)]
    inside = alive[torch.stack([(nu[alive] >= NU[0]) & (nu[alive] <= NU[1]) for nu in nus]).all(0)]
    by_scaling = rank_sum([ranked(nu, among=inside, largest=False) for nu in nus])
    statistics = read_table(run.out / "latents.parquet", thing="latents")
    value = torch.from_numpy(statistics["mean_value"].to_numpy() * statistics["density"].to_numpy())
    difference = cc.decoder_rows(cc.writes.resolve(b).key, "raw") - cc.decoder_rows(cc.writes.resolve(a).key, "raw")
    moved = ranked(value * difference.detach().norm(dim=1), among=alive)
    return {"norm": norm, "scaling": by_scaling, "rank sum": rank_sum([norm, by_scaling]), "moved": moved}


def report(there: PatchingCurves, back: PatchingCurves, about: Mapping[str, Any], date: str) -> str:
    """The text of the report."""
    lines = [f"# KL patching on the shipped pair, {date}", "", " · ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += [
        "`h_S = x_a + Σ_{j ∈ S} f_j (d_j^b − d_j^a)` in the place of b's activation; KL(b ‖ patched b) in nats, and",
        "the share of the gap that is closed. 95 % intervals by a bootstrap over documents. Published: Minder et al.,",
        "2025, Gemma 2 2B base and chat, layer 13 of 26, 73,728 latents.",
    ]
    for curves, published in ((there, PUBLISHED), (back, {})):
        lines += ["", f"## {curves.a} into {curves.b}", "", *reference_lines(curves, published)]
    lines += ["", "## Rankings", "", *curve_lines(there), ""]
    lines += [f"![share recovered, {g}]({date}-patching-{g.replace(' ', '-')}.svg)\n" for g in GROUPS]
    lines += ["## Top half against bottom half of each ranking's first 4 %", "", *half_lines(there), ""]
    lines += [f"Published: {PUBLISHED_HALVES}."]
    return "\n".join(lines) + "\n"


def reference_lines(curves: PatchingCurves, published: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """KL and share of every reference condition, beside the published figures where there are any."""
    head = [f"{what}, {g}" for g in GROUPS for what in ("KL", "recovered")]
    yield row("condition", *head, *(["published, all / first 9"] if published else []))
    yield row(*["---"] * (1 + len(head) + bool(published)))
    for condition in curves.conditions:
        if condition.kind in ("reference", "tokens"):
            cells = [
                text
                for group in GROUPS
                for text in (
                    number(curves.divergence(condition, group=group)),
                    percent(curves.share_recovered(condition, group=group)),
                )
            ]
            name = "only template tokens" if condition.kind == "tokens" else condition.name
            yield row(name, *cells, *([published.get((condition.kind, condition.name), "")] if published else []))


def curve_lines(curves: PatchingCurves) -> Iterator[str]:
    """The share recovered by the number of latents, for every ranking and group."""
    for group in GROUPS:
        found = {name: dict(curves.curve(name, group=group)) for name in curves.names}
        sizes = sorted({size for curve in found.values() for size in curve})
        yield row(f"recovered, {group}", *(f"{size:,}" for size in sizes))
        yield row(*["---"] * (1 + len(sizes)))
        for name, curve in found.items():
            yield row(name, *(percent(curve[size]) if size in curve else "" for size in sizes))
        yield ""


def half_lines(curves: PatchingCurves) -> Iterator[str]:
    """What either half recovers, and the difference."""
    yield row(
        "ranking", "latents in a half", *(f"{what}, {g}" for g in GROUPS for what in ("top", "bottom", "top − bottom"))
    )
    yield row(*["---"] * (2 + 3 * len(GROUPS)))
    tops = [condition for condition in curves.conditions if condition.kind == "top half"]
    for top in tops:
        bottom = Condition("bottom half", top.name, top.num_latents)
        cells: list[str] = []
        for group in GROUPS:
            cells += [percent(curves.share_recovered(half, group=group)) for half in (top, bottom)]
            cells.append(percent(curves.halves(top.name, group=group)))
        yield row(top.name, str(top.num_latents), *cells)


def plot(curves: PatchingCurves, group: str) -> str:
    """Share recovered against the number of latents (logarithmic), with bands, and the line of all latents."""
    found = {name: curves.curve(name, group=group) for name in curves.names}
    most = log10(max(size for curve in found.values() for size, _ in curve))

    def x(size: float) -> float:
        return LEFT + log10(size) / most * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - max(-0.05, share) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="18">share of the KL gap recovered, tokens: {escape(group)}</text>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e9ecef"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    for power in range(int(most) + 1):
        parts.append(f'<text x="{x(10**power):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{10**power:,}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">latents</text>')
    every = y(curves.share_recovered(Condition("reference", "latents"), group=group).value)
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{every:.1f}" y2="{every:.1f}" stroke="#212529" '
        'stroke-dasharray="4 3"/>'
    )
    parts.append(f'<text x="{WIDTH - RIGHT + 4}" y="{every + 4:.1f}">all latents</text>')
    for place, (name, curve) in enumerate(found.items()):
        line = " ".join(f"{x(size):.1f},{y(share.value):.1f}" for size, share in curve)
        band = [(size, share.high) for size, share in curve] + [(size, share.low) for size, share in reversed(curve)]
        around = " ".join(f"{x(size):.1f},{y(share):.1f}" for size, share in band)
        colour, at = COLOURS[name], TOP + 60 + 16 * place
        parts.append(f'<polygon points="{around}" fill="{colour}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 4}" y="{at}" fill="{colour}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif"'
    return f'{head} font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


def row(*cells: str) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def number(estimate: Estimate) -> str:
    """Nats, with the interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def percent(estimate: Estimate) -> str:
    """A share, with the interval."""
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="a finished and evaluated run of two models"
    )
    parser.add_argument("--contexts", type=int, default=128, help="dialogues to patch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/reports"), help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="few contexts and sizes")
    given = parser.parse_args(arguments)
    run = open_run(given.run)
    a, b = (source.key for source in run.crosscoder.writes)
    plan = PatchingPlan(num_contexts=4, sizes=(10, 100), num_random=1) if given.quick else PatchingPlan(
        num_contexts=given.contexts
    )  # fmt: skip
    began = time.perf_counter()
    there = patching(run.crosscoder, run.models, run.text, a=a, b=b, rankings=rankings(run, a, b), plan=plan)
    back = patching(run.crosscoder, run.models, run.text, a=b, b=a, rankings={}, plan=plan)
    date = datetime.date.today().isoformat()
    about = {
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.perf_counter() - began),
        "latents": run.crosscoder.num_latents,
        "contexts": there.num_contexts,
        "documents": there.num_documents,
        "tokens": " / ".join(f"{there.num_tokens[there.groups.index(g)]:,} {g}" for g in GROUPS),
    }
    text = report(there, back, about, date)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{date}-patching.md").write_text(text, encoding="utf-8")
    for group in GROUPS:
        name = f"{date}-patching-{group.replace(' ', '-')}.svg"
        (given.out / name).write_text(plot(there, group), encoding="utf-8")
    content = {"format": "crosscoder.benchmark/1", "about": about, "there": there.to_json(), "back": back.to_json()}
    (given.out / f"{date}-patching.json").write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
