"""What the command line shows: results on standard output; errors, progress and logs on standard error."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from crosscoder.errors import CrosscoderError
from crosscoder.training.json_numbers import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from crosscoder.training.progress import ProgressView

USER_ERROR = 2
INTERRUPTED = 130


@contextmanager
def one_screen(after_interrupt: str) -> Iterator[None]:
    """Turns the user's mistakes into one message and exit code 2, and Ctrl-C into `after_interrupt` and 130.

    All other exceptions are ours, and keep their traceback.
    """
    try:
        yield
    except CrosscoderError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt as error:
        typer.echo(f"\nStopped. {after_interrupt}", err=True)
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def terminal() -> Iterator[ProgressView]:
    """A progress view on standard error, with this package's log lines above it and third parties kept quiet."""
    from crosscoder.training.progress import ProgressView

    with ProgressView() as view:
        log = logging.getLogger("crosscoder")
        log.handlers = [_Lines(view.console)]
        log.setLevel(logging.INFO)
        log.propagate = False
        _quiet()
        yield view


class _Lines(logging.Handler):
    """Log records as plain lines above the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(f"{level}{record.getMessage()}", markup=False, highlight=False, soft_wrap=True)


def _quiet() -> None:
    """No bars of third parties beside our own."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def print_json(content: Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON value on standard output; null for numbers that JSON does not have."""
    typer.echo(json_text(content, indent=2))


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Names and values, aligned, on standard output."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        typer.echo(f"{name.ljust(width)}  {shown(value)}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on standard output; the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())


def shown(value: object) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
