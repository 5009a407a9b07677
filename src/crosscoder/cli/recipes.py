"""The body of `crosscoder recipes`: run files of published set-ups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from crosscoder.cli.reporting import print_json, print_pairs
from crosscoder.errors import ConfigError
from crosscoder.files import replacing
from crosscoder.training.recipes import RECIPES, recipe, with_overrides


def list_recipes(*, as_json: bool) -> None:
    """Print every recipe's name and what it is."""
    if as_json:
        print_json([{"name": r.name, "title": r.title, "source": r.source} for r in RECIPES.values()])
        return
    print_pairs({each.name: each.title for each in RECIPES.values()})
    typer.echo("\nNext: crosscoder recipes NAME --out run.yaml, then crosscoder train run.yaml --dry-run")


def print_recipe(name: str, overrides: Sequence[str], *, out: Path | None, as_json: bool) -> None:
    """Print or write the run file of a recipe, with changes."""
    chosen = recipe(name)
    text = chosen.text(overrides)
    if out is not None:
        _write(text, out)
    if as_json:
        run = with_overrides(chosen.run(), overrides, name=f"the recipe {name}")
        told = {"name": chosen.name, "title": chosen.title, "source": chosen.source, "departures": chosen.departures}
        print_json({**told, "run": run.model_dump(mode="json")})
    elif out is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"The run file is {out}. Next: crosscoder train {out} --dry-run")


def _write(text: str, out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} is there already.", hint="Choose another name, or take the file away.")
    with replacing(out) as draft:
        draft.write_text(text, encoding="utf-8")
