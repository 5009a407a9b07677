"""The body of `crosscoder convert`, and what it says of a conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from crosscoder.cli.reporting import print_json, print_pairs, terminal
from crosscoder.errors import ConfigError

if TYPE_CHECKING:
    from crosscoder.interop import Conversion, Layout


@dataclass(frozen=True)
class Names:
    """What the file does not say, as written on the command line."""

    models: str | None
    site: str | None
    scales: str | None


def run(source: str, names: Names, *, out: Path, layout: str, to: str, as_json: bool) -> None:
    """Convert into our layout, or out of it."""
    if to != "crosscoder":
        _write_foreign(source, names, out=out, layout=layout, to=to, as_json=as_json)
        return
    with terminal() as view:
        from crosscoder import interop

        done = interop.convert(
            source,
            layout=cast("Layout", layout),
            models=_models(names.models),
            sites=None if names.site is None else names.site.split(","),
            scales=_scales(names.scales),
            progress=view,
        )
        view("writing the crosscoder", 0, 1)
        done.crosscoder.save(out)
        view("writing the crosscoder", 1, 1)
    if as_json:
        print_json({"out": str(out), **done.to_json()})
        return
    _print(done)
    typer.echo(f"\nWritten to {out}. Load it: xc.Crosscoder.load({str(out)!r})")


def _write_foreign(source: str, names: Names, *, out: Path, layout: str, to: str, as_json: bool) -> None:
    if layout != "auto" or any((names.models, names.site, names.scales)):
        raise ConfigError(
            "--from, --models, --site and --scales are for reading another tool's files.",
            hint=f"Leave them out with --to {to}: a crosscoder of this package says all that itself.",
        )
    with terminal() as view:
        from crosscoder import interop
        from crosscoder.analysis.opened_run import open_crosscoder

        view("writing the crosscoder", 0, 1)
        done = interop.export(open_crosscoder(source), out, layout=cast("Layout", to))
        view("writing the crosscoder", 1, 1)
    if as_json:
        print_json(done.to_json())
        return
    _print_lines("said", done.remarks)
    typer.echo(f"\nWritten to {done.path}, in the layout {done.layout}.")


def _print(done: Conversion) -> None:
    cc = done.crosscoder
    print_pairs({"layout": done.layout, "weights": done.weights, "latents": cc.num_latents, "kind": cc.nonlinearity})
    for source in cc.sources.describe():
        typer.echo(f"source   {source}")
    _print_lines("assumed", done.assumed)  # warnings were logged


def _print_lines(name: str, lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(f"{name:9}{line}")


def _models(text: str | None) -> Mapping[str, str | None] | None:
    """`base=path,chat=path` or `base,chat`."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if len({alias for alias, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"expected different names in --models; got {text!r}.")
    return {alias.strip(): path.strip() or None for alias, _, path in pairs}


def _scales(text: str | None) -> Mapping[str, float] | Sequence[float] | None:
    """`base=0.28,chat=0.24` or `0.28,0.24`."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        if all(equals for _, equals, _ in pairs):
            return {name.strip(): float(value) for name, _, value in pairs}
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"expected numbers in --scales; got {text!r}.", hint="Write base=0.28,chat=0.24, or 0.28,0.24."
        ) from error
