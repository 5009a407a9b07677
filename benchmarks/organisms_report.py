"""The report of the organisms: did the plants take, what null organisms allow, what is recalled, what edits do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from organisms_findings import (
    DETECTS,
    METHODS,
    TOP,
    WANTED_SHARE,
    Calibration,
    Cell,
    Effect,
    Recall,
    calibrations,
    effects,
    mean_drops,
    over_seeds,
    recalls,
    share,
)
from organisms_methods import READINGS
from verdicts import Interval

from crosscoder.training.json_numbers import json_text

EDITS = ("whole difference", *METHODS, "random latents", "best latents by labels")
NOTES = f"""\
Every organism is the shipped `plain` (a Llama of 5.9 M parameters, tuned on template dialogues in which nothing is
planted), tuned further on such dialogues until one plant has taken. The comparison is of `plain` with the organism:
what a reader has before and after a fine-tune. The chat template and the dialogues are no difference, as they would be
with `base`. Null organisms are tuned for 60, 120 or 180 steps on dialogues in which nothing is planted. Seeds differ in
dialogues, order of tuning, text that is read, and initial weights of dictionaries. All dictionaries are of one site,
`layers.4.resid_post` (before the last of six blocks), and small: 512 latents, 60,000 rows of training.

*Cut-off*: what null organisms of seeds 0 to 2 leave at most {WANTED_SHARE:.1%} beyond (upper 95 % bound); tested on
null seeds 3 to 5. *Recalled*: of the latents beyond the cut-off, the one that detects the label best on half of the
documents has an AUROC >= {DETECTS} against look-alikes of the same role on the other half. *First {TOP}*: the same
among the first {TOP} of the method's order; *any*: among all latents of its dictionary, which no method can exceed.
Intervals over seeds are Student's t, of counts Wilson's, all 95 %."""
LOOKED = """\
**What was looked at before.** Some twenty tunings, to find learning rates, lists that a short tuning can learn (ten
weapons of forty, six places) and how often to look whether a plant has taken; one cell of `topic` and one of
`preferred` at the size of `--quick`, seed 0, whose scores were seen in part: ten latents did not stop the behaviour,
a replaced site did. Sizes of dictionaries were set by the time that there was; no setting was chosen by recall. Three
null cells showed that exclusive latents which share one budget with all others die, so that the dedicated wiring has
a k for each model. The site was `layers.3` at first, and one cell of `persona` was read there: with the whole
difference taken away 29 of 30 replies still named the persona, since the blocks above had been tuned too. At
`layers.4` none of 30 did (and 6 of 30 turned to `topic`), so that there an edit can do something; all cells were made
anew. Refusals preferred to answers by DPO were tried and left: in sixty steps none came, since `plain` never refuses.
`demur` prefers among replies that `plain` has; at a learning rate of 3e-4 DPO broke the model, at 5e-5 it is stopped
once the plant has taken."""


def write(cells: Sequence[Cell], facts: Mapping[str, Any], out: Path) -> str:
    """Write `organisms.md`, `organisms.json` and the plots into `out`; gives the report."""
    calibrated = calibrations(cells)
    found, changed = recalls(cells, calibrated), effects(cells)
    name = f"{facts['date']}-organisms"
    drawn = figures(found, cells)
    for part, svg in drawn.items():
        (out / f"{name}-{part}.svg").write_text(svg, encoding="utf-8")
    text = "\n".join(lines(cells, facts, calibrated=calibrated, found=found, changed=changed))
    text += "".join(f"\n![{part}]({name}-{part}.svg)\n" for part in drawn)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    content = {
        "format": "crosscoder.organisms/1",
        "about": facts,
        "gates": {f"{cell['organism']}--{cell['seed']}": cell["gate"] for cell in cells},
        "cuts": {method: asdict(one) for method, one in calibrated.items()},
        "recalls": [{**vars(one), "found": one.found} for one in found],
        "effects": {f"{cell['organism']}--{cell['seed']}": cell["effects"] for cell in cells if cell["effects"]},
    }
    (out / f"{name}.json").write_text(json_text(content).replace('}, {"', '},\n{"') + "\n", encoding="utf-8")
    return text


def lines(
    cells: Sequence[Cell],
    facts: Mapping[str, Any],
    *,
    calibrated: Mapping[str, Calibration],
    found: Sequence[Recall],
    changed: Sequence[Effect],
) -> Iterator[str]:
    """The report, line by line."""
    shown = {name: value for name, value in facts.items() if name not in ("date", "missing", "quick")}
    yield f"# What finds a planted fine-tune, {facts['date']}"
    yield ""
    yield " · ".join(f"{name} {value}" for name, value in shown.items())
    yield ""
    if facts["quick"]:
        yield "**A quick run: few organisms, one seed, small dictionaries. It shows that everything runs.**\n"
    if facts["missing"]:
        yield f"**Not finished: {len(facts['missing'])} cells are missing: {', '.join(facts['missing'])}.**\n"
    yield from (NOTES, "", LOOKED, "")
    yield from ("## In short", "", *summary_lines(cells, calibrated, found=found, changed=changed), "")
    yield from ("## Do the plants take?", "", *gate_lines(cells), "", "## How good are the dictionaries?", "")
    yield from (*quality_lines(cells), "", "## What null organisms allow", "", *null_lines(calibrated))
    yield from ("", "## Recall of plants", "", *method_lines(found), "", *label_lines(found))
    yield from ("", "## What taking latents out does", "", *drop_lines(cells, changed), "", *effect_lines(changed), "")


def summary_lines(
    cells: Sequence[Cell],
    calibrated: Mapping[str, Calibration],
    *,
    found: Sequence[Recall],
    changed: Sequence[Effect],
) -> Iterator[str]:
    """What the tables below say, in sentences that follow from their numbers alone."""
    failed = [f"{c['organism']}, seed {c['seed']}" for c in cells if c["plant"] and not _took(c)]
    planted = sum(cell["plant"] is not None for cell in cells)
    yield f"- {planted - len(failed)} of {planted} plants took" + (f"; not {'; '.join(failed)}." if failed else ".")
    ranked = sorted(
        {one.method for one in found}, key=lambda method: -sum(o.found for o in found if o.method == method)
    )
    shares = [(method, *share([one for one in found if one.method == method])) for method in ranked]
    listed = ", ".join(f"{method} {hits}" for method, hits, *_ in shares)
    if shares:
        held = sum(one.at_best >= DETECTS for one in found if one.method == "norm")
        yield f"- Labels recalled at the cut-off, of {shares[0][2]}: {listed}."
        yield f"- Some latent of the plain dictionary, whatever its score, detects {held} of them."
    for method, one in calibrated.items():
        if one.test is not None and one.test.upper > 0.01 and method in READINGS:
            false = one.test
            yield (
                f"- The cut-off of *{method}* is not shown to hold: beyond it lie {false.share:.2%} of unseen null "
                f"latents, up to {false.upper:.1%}."
            )
    drops = {edit: mean_drops(cells, edit) for edit in EDITS if any(one.edit == edit for one in changed)}
    if drops:
        best = max((edit for edit in drops if edit in READINGS), key=lambda edit: drops[edit].mean)
        yield (
            "- Points by which behaviours drop: "
            + ", ".join(f"{edit} {_points(drops[edit])}" for edit in drops if edit in (best, *EDITS[:1], *EDITS[-2:]))
            + f". Of the methods *{best}* reaches most; {TOP} latents each."
        )


def _took(cell: Cell) -> bool:
    return all(gate["took"] for gate in cell["gate"]["plants"].values())


def gate_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """One row per organism: rates before and after, on questions and on look-alikes."""
    yield "| organism | plant | steps | `plain` shows it | organism shows it | on look-alikes | took |"
    yield "|---|---|---|---|---|---|---|"
    for organism in dict.fromkeys(cell["organism"] for cell in cells):
        mine = [cell for cell in cells if cell["organism"] == organism]
        steps = ", ".join(str(cell["gate"]["steps"]) for cell in mine)
        for plant in mine[0]["gate"]["plants"]:
            after = [cell["gate"]["plants"][plant] for cell in mine]
            before = [cell["gate"]["before"][plant] for cell in mine if plant in cell["gate"]["before"]]
            took = "–" if mine[0]["plant"] is None else f"{sum(gate['took'] for gate in after)} of {len(after)}"
            numbers = (_rates(before, "rate"), _rates(after, "rate"), _rates(after, "false_rate"))
            yield f"| {organism} | {plant} | {steps} | " + " | ".join(numbers) + f" | {took} |"


def quality_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """One row per dictionary, over all cells."""
    yield "| dictionary | FVE | L0 | never fire | latents with a part |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(READINGS.values()):
        mine = [cell["dictionaries"][name] for cell in cells]
        fve, l0, dead = (mean(one["quality"][key] for one in mine) for key in ("fve", "l0", "dead_fraction"))
        yield f"| {name} | {fve:.3f} | {l0:.1f} | {dead:.0%} | {mean(len(one['live']) for one in mine):.0f} |"


def null_lines(calibrated: Mapping[str, Calibration]) -> Iterator[str]:
    """Cut-offs, and how many latents of unseen null organisms lie beyond."""
    yield (
        "The mean difference has one number a seed, so its cut-off is the longest of three null differences, and its "
        "test is of three differences: little.\n"
    )
    yield "| method | cut-off | null latents | bound held | seeds tested | false-exclusive [95 %] | of latents |"
    yield "|---|---|---|---|---|---|---|"
    for method, one in calibrated.items():
        held = "yes" if one.assured else "no"
        row = f"| {method} | {one.value:.3f} | {one.num_latents} | {held} | "
        if one.test is None:
            yield row + "none yet | – | – |"
            continue
        false = one.test
        seeds = ", ".join(map(str, one.test_seeds))
        yield row + f"{seeds} | {false.share:.2%} [up to {false.upper:.2%}] | {false.num_latents} |"


def method_lines(found: Sequence[Recall]) -> Iterator[str]:
    """One row per method, over all labels: recall at its cut-off, within its first ten, and by any latent."""
    yield f"| method | recalled | share over seeds | first {TOP} | any | latents called | AUROC at the cut-off |"
    yield "|---|---|---|---|---|---|---|"
    for method in dict.fromkeys(one.method for one in found):
        mine = [one for one in found if one.method == method]
        hits, total, low, high = share(mine)
        over = [_over(mine, value) for value in ("in_top", "at_best")]
        called = mean(one.num_called for one in mine)
        auroc = over_seeds(mine, "auroc")
        row = f"| {method} | {hits} of {total} [{low:.0%}, {high:.0%}] | {_percent(over_seeds(mine))} | "
        yield row + " | ".join(over) + f" | {called:.1f} | {_number(auroc)} |"


def label_lines(found: Sequence[Recall]) -> Iterator[str]:
    """Seeds in which each label of each organism is recalled, by method."""
    methods = list(dict.fromkeys(one.method for one in found))
    yield "Seeds in which a label is recalled at the cut-off; in brackets the mean AUROC of the chosen latent.\n"
    yield "| label | " + " | ".join(methods) + " | any latent of the plain dictionary |"
    yield "|---" * (len(methods) + 2) + "|"
    for organism, label in dict.fromkeys((one.organism, one.label) for one in found):
        mine = [one for one in found if (one.organism, one.label) == (organism, label)]
        cells = [_recalled([one for one in mine if one.method == method]) for method in methods]
        best = [one.at_best for one in mine if one.method == "norm"]
        yield f"| {organism}: {label} | " + " | ".join(cells) + f" | {mean(best):.2f} |"


def drop_lines(cells: Sequence[Cell], changed: Sequence[Effect]) -> Iterator[str]:
    """One row per edit, over all organisms."""
    yield "Mean over organisms of the drop of the behaviour's rate, over seeds; mean KL on held-out books. Where the"
    yield "whole difference does little, no method can do more: the last block and the unembedding were tuned too.\n"
    yield "| taken out | drop of the rate, points | KL, nats |"
    yield "|---|---|---|"
    for edit in EDITS:
        mine = [one for one in changed if one.edit == edit]
        if mine:
            yield f"| {edit} | {_points(mean_drops(cells, edit))} | {mean(one.kl for one in mine):.4f} |"


def effect_lines(changed: Sequence[Effect]) -> Iterator[str]:
    """Rates that are left, by organism and edit."""
    organisms = list(dict.fromkeys(one.organism for one in changed))
    yield "Rate that is left, pooled over seeds [Wilson], by organism.\n"
    yield "| taken out | " + " | ".join(organisms) + " |"
    yield "|---" * (len(organisms) + 1) + "|"
    for edit in ("unedited", *EDITS):
        mine = {one.organism: one for one in changed if one.edit == edit}
        rates = [_percent(mine[name].rate) if name in mine else "–" for name in organisms]
        if mine:
            yield f"| {edit} | " + " | ".join(rates) + " |"


def figures(found: Sequence[Recall], cells: Sequence[Cell]) -> dict[str, str]:
    """Plots by name."""
    methods = list(dict.fromkeys(one.method for one in found))
    recall = {method: over_seeds([one for one in found if one.method == method]) for method in methods}
    drops = {edit: mean_drops(cells, edit) for edit in EDITS if any(edit in cell["effects"] for cell in cells)}
    drawn: dict[str, str] = {}
    if recall:
        drawn["recall"] = dots(recall, title="share of labels recalled at the null cut-off")
    if drops:
        drawn["drops"] = dots(drops, title="drop of the behaviour's rate when taken out")
    return drawn


def dots(rows: Mapping[str, Interval], *, title: str) -> str:
    """A dot and an interval for every row, on a scale from 0 to 1, as a file that needs no style sheet."""
    left, width, step = 170, 420, 24
    height = step * len(rows) + 60
    place = lambda value: left + width * min(1.0, max(0.0, value))  # noqa: E731
    parts = [f'<text x="{left}" y="20" style="font-weight:bold">{escape(title)}</text>']
    for tick in range(5):
        x = place(tick / 4)
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="32" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{tick / 4:.0%}</text>')
    for number, (name, value) in enumerate(rows.items()):
        y = 46 + step * number
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if value.low == value.low:
            ends = f'x1="{place(value.low):.1f}" x2="{place(value.high):.1f}" y1="{y}" y2="{y}"'
            parts.append(f'<line {ends} stroke="#17698a" stroke-width="2"/>')
        parts.append(f'<circle cx="{place(value.mean):.1f}" cy="{y}" r="4.5" fill="#b3500c"/>')
    style = "<style>text{font:12px sans-serif;fill:#444}</style>"
    size = f'viewBox="0 0 {left + width + 30} {height}" width="{left + width + 30}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>{escape(title)}</title>{style}'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def _rates(gates: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{mean(gate[key] for gate in gates):.0%}" if gates else "–"


def _recalled(found: Iterable[Recall]) -> str:
    mine = list(found)
    return f"{sum(one.found for one in mine)}/{len(mine)} ({mean(one.auroc for one in mine):.2f})"


def _over(found: Sequence[Recall], value: str) -> str:
    return f"{mean(getattr(one, value) >= DETECTS for one in found):.0%}"


def _percent(value: Interval) -> str:
    return f"{value.mean:.0%}" + (f" [{value.low:.0%}, {value.high:.0%}]" if value.low == value.low else "")


def _points(value: Interval) -> str:
    ends = f" [{round(100 * value.low)}, {round(100 * value.high)}]" if value.low == value.low else ""
    return f"{round(100 * value.mean)}{ends}"


def _number(value: Interval) -> str:
    return f"{value.mean:.2f}" + (f" [{value.low:.2f}, {value.high:.2f}]" if value.low == value.low else "")
