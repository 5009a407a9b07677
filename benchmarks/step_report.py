"""The report of the step benchmark: what it had to show, tables of every size, exactness, phases, plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from step_plots import ratio_bars, stacked_phases

from crosscoder.training.json_numbers import json_text

Cell = Mapping[str, Any]
BASELINE = "ours"
RATIOS = {"dense": 3.3, "sparsify TopK": 2.5}
"""How many times ours a step of theirs has to take, at least, with torch operations only."""
PEAK_GB = {"A": 0.4, "B": 3.3, "C": 0.4}
GRADIENT_ERROR = 1e-5
TIE = 1e-6
SCENARIOS = {"alive": "no latent is dead", "dead": "a tenth of the latents is dead, AuxK works"}
SHORTEST_PHASE = 0.01

NOTES = """\
One step is a whole update on raw rows: normalise, encode, select, decode, gradients, clip, Adam, gate, dead counts. All
start with the same weights, trained by ours; batches are distinct. Every contender has a process; all take turns, one
step in each turn that is not counted, then the counted ones. *ms*: median of quiet steps, those of turns in which
others took at most 6 % of the cores; `~` where fewer than three were quiet: CPU seconds over threads instead. *ratio*:
time over ours in the same round, median [lowest, highest] over rounds whose two turns were quiet; *(CPU)*: of CPU
seconds over all rounds, where fewer than two were. *peak*: VmHWM while stepping less what was resident before the
contender was built. *TopK* selects in each row, the others over the batch.

Not like for like: sparsify and sae-lens get rows that are normalised already; their AuxK is their own (all dead
latents, all rows), that of the others is ours (at most 512 dead latents and every fourth row a step). sae-lens' sparse
variant does not rescale by decoder norms, which fails with sparse codes. bf16 autocast changes what is selected."""


def write(cells: Sequence[Cell], out: Path) -> str:
    """Write `<date>-step.md`, `.json` and the plots into `out`; gives the report."""
    if not cells:
        raise SystemExit(f"there is no cell in {out}: measure first, without --report-only.")
    date = max(cell["about"]["date"] for cell in cells)
    drawn = figures(cells)
    for name, svg in drawn.items():
        (out / f"{date}-step-{name}.svg").write_text(svg, encoding="utf-8")
    lines = [f"# The training step beside others', {date}", "", *about_lines(cells), "", NOTES, ""]
    if any(cell["quick"] for cell in cells):
        lines += ["**A quick run: it shows that everything runs. No number below means anything.**", ""]
    lines += [*(f"- {line}" for line in dict.fromkeys(line for cell in cells for line in cell["missing"])), ""]
    lines += ["## What it had to show", "", *target_lines(cells)]
    for cell in cells:
        lines += ["", f"## Size {title(cell)}", "", *size_lines(cell)]
    lines += ["", "## Exactness on the trained weights", "", *check_lines(cells)]
    lines += ["", "## Where our step spends its time", "", *phase_lines(cells), ""]
    lines += [f"![{name}]({date}-step-{name}.svg)\n" for name in drawn]
    report = "\n".join(lines).rstrip() + "\n"
    (out / f"{date}-step.md").write_text(report, encoding="utf-8")
    content = {"format": "crosscoder.benchmark/1", "cells": [rounded(cell) for cell in cells]}
    (out / f"{date}-step.json").write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
    return report


def title(cell: Cell) -> str:
    """A size in one line."""
    size = cell["size"]
    numbers = f"S = {size['num_sources']}, d = {size['width']:,}, F = {size['num_latents']:,}"
    return f"{size['name']}: {numbers}, B = {size['batch_size']:,}, k = {size['k']}"


def about_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """What made the numbers; once, if all sizes were made alike."""
    yield from dict.fromkeys(" · ".join(f"{k} {v}" for k, v in cell["about"].items()) for cell in cells)


def rows(cell: Cell) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The scenarios that were measured."""
    return ((name, cell["scenarios"][name]) for name in SCENARIOS if name in cell["scenarios"])


def target_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """Every target, and what was found."""
    yield "| size | latents | target | found | |"
    yield "|---|---|---|---|---|"
    for cell in cells:
        for scenario, found in rows(cell):
            for target, number, reached in targets(cell, found):
                verdict = "yes" if reached else "**no**"
                yield f"| {cell['size']['name']} | {scenario} | {target} | {number} | {verdict} |"


def targets(cell: Cell, found: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """What a step has to show, the number, and whether it does."""
    contenders, checks = found["contenders"], found["checks"]
    for name, least in RATIOS.items():
        if name in contenders:
            ratio = contenders[name]["ratio"]
            yield f"{name} takes at least {least} times ours", f"{ratio:.2f}", ratio >= least
    most, peak = PEAK_GB.get(cell["size"]["name"]), contenders[BASELINE]["peak_gb"]
    if most is not None and peak is not None:
        yield f"peak memory below {most} GB", f"{peak:.2f} GB", peak < most
    for name, own in checks.items():
        if not name.startswith(BASELINE):
            continue
        error = max(own["gradient_errors"].values())
        yield f"{name}: float32's set but for ties", set_text(own), own["largest_distance"] <= TIE
        yield f"{name}: gradients within {GRADIENT_ERROR:g}", f"{error:.1e}", error <= GRADIENT_ERROR
        yield f"{name}: two runs bit-equal", "equal" if own["bit_equal"] else "different", own["bit_equal"]


def set_text(check: Mapping[str, Any]) -> str:
    """How a selected set differs from the expected one."""
    if not check["differing"]:
        return f"equal ({check['kept']:,} pairs)"
    return f"{check['differing']} of {check['kept']:,} differ, at most {check['largest_distance']:.1e} from the cut"


def size_lines(cell: Cell) -> Iterator[str]:
    """Tables of one size."""
    steps, fve = cell["size"]["training_steps"], cell["fve"]
    yield f"Weights trained for {steps} steps; they explain {fve:.1%} of the variance."
    for scenario, found in rows(cell):
        yield ""
        yield f"### {cell['size']['name']}, {SCENARIOS[scenario]}"
        yield ""
        yield "| contender | ms | quiet / steps | best ms | CPU ms / threads | rows/s | ratio to ours | peak GB |"
        yield "|---|---|---|---|---|---|---|---|"
        ordered = sorted(found["contenders"].items(), key=lambda item: item[1]["ratio"])
        yield from (contender_line(name, numbers) for name, numbers in ordered)
        yield ""
        yield from floor_lines(found)


def contender_line(name: str, numbers: Mapping[str, Any]) -> str:
    """One row of a table."""
    sign = "~" if numbers["estimated"] else ""
    spread = f"[{numbers['ratio_low']:.2f}, {numbers['ratio_high']:.2f}]" + (
        " (CPU)" if numbers["ratio_by_cpu"] else ""
    )
    peak = "–" if numbers["peak_gb"] is None else f"{numbers['peak_gb']:.2f}"
    shown = (
        f"**{name}**" if name == BASELINE else name,
        f"{sign}{numbers['ms']:.0f}",
        f"{numbers['quiet']}/{numbers['steps']}",
        f"{numbers['best_ms']:.0f}",
        f"{numbers['cpu_ms']:.0f}",
        f"{numbers['rows_per_second']:,.0f}",
        f"{numbers['ratio']:.2f} {spread}",
        peak,
    )
    return "| " + " | ".join(shown) + " |"


def floor_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Rates, floors, and how far above the floors steps are."""
    rates, floors, contenders = found["rates"], found["floor_ms"], found["contenders"]
    yield (
        f"Rates: product {rates['float32'] / 1e9:.0f} GF/s in float32, {rates['bfloat16'] / 1e9:.0f} in bfloat16; "
        f"copy {rates['copy'] / 1e9:.0f} GB/s; fused Adam {rates['adam'] / 1e9:.0f} GB/s."
    )
    yield (
        f"Floors: dense {floors['dense']:.0f} ms, sparse {floors['sparse']:.0f} ms, sparse with a bfloat16 encoder "
        f"product {floors['sparse_bfloat16']:.0f} ms. Ours takes "
        f"{contenders[BASELINE]['ms'] / floors['sparse_bfloat16']:.2f} times the last"
        + (
            f", dense {contenders['dense']['ms'] / floors['dense']:.2f} times the first."
            if "dense" in contenders
            else "."
        )
    )


def check_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """What was selected, and how exact gradients are."""
    yield "Relative errors against float64 on the same set: encoder, encoder bias, decoder, bias."
    yield ""
    yield "| size | latents | contender | set against float32's | gradient errors | two runs |"
    yield "|---|---|---|---|---|---|"
    for cell in cells:
        for scenario, found in rows(cell):
            for name, own in found["checks"].items():
                errors = ", ".join(f"{error:.0e}" for error in own["gradient_errors"].values())
                runs = {True: "bit-equal", False: "**different**", None: ""}[own.get("bit_equal")]
                place = f"| {cell['size']['name']} | {scenario} | {name} "
                yield f"{place}| {set_text(own)} | {errors} | {runs} |"


def phase_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """Functions of the library, then operations of torch, in milliseconds per step."""
    yield (
        "Profiled apart from the race, so that sums differ from the times above: milliseconds of the fastest of some "
        "steps by function of the library (its own, and what it calls outside), and per step by operation of torch."
    )
    for cell in cells:
        for scenario, found in rows(cell):
            yield ""
            yield f"### {cell['size']['name']}, {SCENARIOS[scenario]}"
            for kind, by_name in found["phases"].items():
                yield ""
                yield f"| {kind} | ms | share |"
                yield "|---|---|---|"
                whole = sum(by_name.values())
                kept = {name: ms for name, ms in by_name.items() if ms >= SHORTEST_PHASE * whole}
                yield from (f"| `{name}` | {ms:.1f} | {ms / whole:.0%} |" for name, ms in kept.items())


def figures(cells: Sequence[Cell]) -> dict[str, str]:
    """Plots by name."""
    drawn: dict[str, str] = {}
    for cell in cells:
        for scenario, found in rows(cell):
            name = cell["size"]["name"]
            heading = f"Size {name}, {SCENARIOS[scenario]}: time over ours"
            drawn[f"{name}-{scenario}"] = ratio_bars(found["contenders"], title=heading)
    by_size = {f"{c['size']['name']}, {s}": f["phases"]["functions"] for c in cells for s, f in rows(c)}
    return drawn | {"phases": stacked_phases(by_size, title="Our step by function of the library")}


def rounded(content: Any) -> Any:
    """Numbers to five significant digits."""
    if isinstance(content, Mapping):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content
