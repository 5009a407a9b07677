"""The body of `crosscoder encode`: one's own prompts, and two sets of them contrasted."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crosscoder.cli.reporting import print_json, print_table, terminal
from crosscoder.errors import ConfigError, TextError

if TYPE_CHECKING:
    from crosscoder.analysis.contrasts import Contrast, HeldOutContrast
    from crosscoder.analysis.opened_run import OpenedRun
    from crosscoder.analysis.prompt_facts import EncodedPrompts
    from crosscoder.analysis.prompt_text import Prompt, Rendering
    from crosscoder.analysis.prompts import PromptCode
    from crosscoder.progress import Progress

ENOUGH_FOR_HALVES = 16
"""Prompts on each side from which on a held-out half is looked at as well."""
MOST_LISTED = 3
"""Prompts up to which every token is printed."""
STATISTICS = "latents.parquet"


@dataclass(frozen=True)
class Asked:
    """Which prompts are encoded, how they are read, what they are set against, and what is shown."""

    prompts: tuple[str, ...]
    file: Path | None
    against: Path | None
    rendering: Rendering | None
    latents: tuple[int, ...]
    top: int


def run(path: str, asked: Asked, *, out: Path | None, as_json: bool) -> None:
    """Encode the prompts, or contrast two files of them, and print what was found."""
    prompts, name = _prompts(asked)
    if asked.against is None:
        _run_prompts(path, asked, prompts, name=name, out=out, as_json=as_json)
        return
    if out is not None:
        raise ConfigError(
            "--out writes the page of prompts; a contrast has none.", hint="Take --json, or leave it out."
        )
    with terminal() as view:
        found = _Found.of(_opened(path, view), prompts, asked, name=name)
    if as_json:
        print_json(found.to_json(asked.top))
    else:
        found.print(asked.top)


def _run_prompts(path: str, asked: Asked, prompts: list[Prompt], *, name: str, out: Path | None, as_json: bool) -> None:
    with terminal() as view:
        encoded = _encoded(_opened(path, view), prompts, asked, name=name)
    if out is not None:
        _write_page(encoded, out, title=path)
    if as_json:
        print_json(encoded.to_json(asked.top))
        return
    _print_prompts(encoded, asked.top)
    if out is not None:
        typer.echo(f"\nOpen the page: {out}")


def _prompts(asked: Asked) -> tuple[list[Prompt], str]:
    """The prompts and what they are called in errors; those of standard input where none are given."""
    from crosscoder.analysis.prompt_text import parse_prompt, parse_prompts, read_prompts

    if asked.prompts and asked.file is not None:
        raise ConfigError("expected --prompt or --prompts, not both.", hint="Put them all into the file.")
    if asked.prompts:
        return [parse_prompt(text) for text in asked.prompts], "--prompt"
    if asked.file is not None and str(asked.file) != "-":
        return read_prompts(asked.file), str(asked.file)
    if sys.stdin.isatty():
        raise TextError(
            "expected prompts; got none.", hint='Give --prompt "...", --prompts FILE, or text on standard input.'
        )
    text = sys.stdin.read()
    as_lines = asked.file is not None or asked.against is not None
    whole = text.removesuffix("\n")
    return parse_prompts(text, name="standard input") if as_lines else [parse_prompt(whole)], "standard input"


def _opened(path: str, progress: Progress) -> OpenedRun:
    """The run, or crosscoder, at `path`; nothing is written beside a crosscoder that has no run directory."""
    from crosscoder.analysis.opened_run import open_run

    return open_run(path, out=path, progress=progress)


def _code(run: OpenedRun, prompts: list[Prompt], asked: Asked, *, name: str) -> PromptCode:
    from crosscoder.analysis.prompts import encode_for_run

    return encode_for_run(run, prompts, rendering=asked.rendering, name=name)


def _encoded(run: OpenedRun, prompts: list[Prompt], asked: Asked, *, name: str) -> EncodedPrompts:
    from crosscoder.analysis.prompt_facts import EncodedPrompts, latent_facts
    from crosscoder.interventions.edits import check_latents

    check_latents(run.crosscoder, asked.latents)
    statistics = (run.out if run.home is None else run.home.path) / STATISTICS
    facts = latent_facts(run.crosscoder, statistics if statistics.is_file() else None)
    return EncodedPrompts(_code(run, prompts, asked, name=name), facts, asked.latents)


def _write_page(encoded: EncodedPrompts, out: Path, *, title: str) -> None:
    from crosscoder import files
    from crosscoder.analysis.prompt_page import prompt_page

    with files.replacing(out) as draft:
        draft.write_text(prompt_page(encoded, title=title), encoding="utf-8")


def _print_prompts(encoded: EncodedPrompts, top: int) -> None:
    for prompt in range(encoded.code.num_prompts):
        if encoded.code.num_prompts > 1:
            typer.echo(f"{'' if prompt == 0 else chr(10)}Prompt {prompt + 1}")
        if encoded.code.num_prompts <= MOST_LISTED:
            _print_tokens(encoded, prompt, top)
        for by in encoded.rankings:
            entries = [encoded.entry(entry) for entry in encoded.of_prompt(prompt, top, by=by)]
            listed = "  ".join(f"{e['latent']} on {_shown(e['peak'])}" for e in entries)
            typer.echo(f"{_RANKINGS[by]:22}{listed or 'none'}")


_RANKINGS = {"max": "largest score", "sum": "largest sum", "relative": "most above its mean"}


def _print_tokens(encoded: EncodedPrompts, prompt: int, top: int) -> None:
    told = encoded.to_json(top)["prompts"][prompt]["tokens"]
    width = max(len(_shown(token["piece"])) for token in told)
    for token in told:
        latents = "   ".join(map(_active, token["latents"])) if token["read"] else "not read"
        line = f"{token['position']:4} {token['role']:10}{_shown(token['piece']).ljust(width)}  {latents}"
        typer.echo(line.rstrip())


def _active(told: dict[str, Any]) -> str:
    share, norm = told["share_of_max"], told.get("relative_norm")
    beside = ["" if share is None else f" {share:.0%}", "" if norm is None else f" n{norm:.2f}"]
    return f"{told['latent']}:{told['value']:.3g}{''.join(beside)}"


def _shown(piece: str) -> str:
    """A token on a terminal: quoted, and nothing in it that a terminal would obey."""
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece) + "'"


@dataclass(frozen=True)
class _Found:
    """A contrast, the same on held-out halves where there are enough prompts, and both sets' codes."""

    whole: Contrast
    halves: HeldOutContrast | None
    a: EncodedPrompts
    b: EncodedPrompts

    @classmethod
    def of(cls, run: OpenedRun, prompts: list[Prompt], asked: Asked, *, name: str) -> _Found:
        """Encode both sets and contrast them."""
        import torch

        from crosscoder.analysis.contrasts import contrast, held_out_contrast
        from crosscoder.analysis.prompt_facts import EncodedPrompts
        from crosscoder.analysis.prompt_text import read_prompts

        assert asked.against is not None
        against = read_prompts(asked.against)
        a = _encoded(run, prompts, asked, name=name)
        b = EncodedPrompts(_code(run, against, asked, name=str(asked.against)), a.facts, asked.latents)
        values = a.code.per_prompt(), b.code.per_prompt()
        enough = min(a.code.num_prompts, b.code.num_prompts) >= ENOUGH_FOR_HALVES
        among = torch.tensor(asked.latents) if asked.latents else None
        return cls(contrast(*values, among=among), held_out_contrast(*values, among=among) if enough else None, a, b)

    def to_json(self, num: int) -> dict[str, Any]:
        """The contrast's JSON; each latent with what is known of it and where it fires."""
        told = self.whole.to_json(num)
        for row in told["latents"]:
            row |= self.a.facts.of(row["latents"])
            row |= {f"fires_on_{side}": self._fires(side, row["latents"]) for side in ("a", "b")}
        halves = None if self.halves is None else self.halves.to_json(num)
        return {"format": "crosscoder.contrast/1", **told, "held_out": halves}

    def print(self, num: int) -> None:
        """The summary, and a table of the latents that tell most."""
        c = self.whole
        typer.echo(f"A {c.num_a:,} prompts   B {c.num_b:,} prompts   latents tested {len(c.latents):,}")
        by_lot = f"; dealt labels bring {c.by_lot:.2g} as far" if len(c.found) else ""
        typer.echo(f"found at a false discovery rate of {c.level:.0%}: {len(c.found):,}{by_lot}")
        typer.echo(f"AUROC of the prompts' length alone {c.auroc_of_length:.2f}")
        if self.halves is not None:
            h = self.halves
            typer.echo(f"held-out half: {len(h.choosing.found):,} chosen on one, {len(h.scoring.found):,} found again")
        typer.echo()
        head = ("latent", "AUROC", "95 %", "of means", "held out", "in A", "in B", "q", "p, any", "norm", "fires on")
        print_table(head, [self._row(row) for row in c.table().slice(0, num).to_pylist()])

    def _row(self, row: dict[str, Any]) -> tuple[str, ...]:
        latent, norm = row["latents"], self.a.facts.of(row["latents"]).get("relative_norm")
        side = "a" if row["auroc"] >= 0.5 else "b"
        tokens = " ".join(_shown(firing["piece"]) for firing in self._fires(side, latent)[:3])
        return (
            str(latent),
            f"{row['auroc']:.3f}",
            f"{row['auroc_low']:.2f}–{row['auroc_high']:.2f}",
            f"{row['auroc_of_mean']:.3f}",
            self._held_out(latent),
            f"{row['frequency_a']:.0%}",
            f"{row['frequency_b']:.0%}",
            f"{row['q']:.2g}",
            f"{row['p_family']:.2g}",
            "" if norm is None else f"{norm:.2f}",
            tokens,
        )

    def _held_out(self, latent: int) -> str:
        """The AUROC on the half that did not choose; nothing for a latent that was not chosen."""
        if self.halves is None:
            return ""
        place = (self.halves.scoring.latents == latent).nonzero()
        return f"{float(self.halves.scoring.auroc[place[0, 0]]):.3f}" if len(place) else ""

    def _fires(self, side: str, latent: int) -> list[dict[str, Any]]:
        from crosscoder.analysis.contrasts import fires_on

        code = (self.a if side == "a" else self.b).code
        return [firing.to_json() for firing in fires_on(code, latent)]
