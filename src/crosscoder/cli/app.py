"""The verbs and their options. Bodies are imported when a verb runs, so that `--help` is instant."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crosscoder import __version__
from crosscoder.cli.reporting import one_screen

app = typer.Typer(
    name="crosscoder",
    help="Sparse dictionaries over several sources of language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CONTINUES = "The same command goes on from the last checkpoint."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the run file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Trained = Annotated[str, typer.Argument(metavar="RUN", help="A run, a crosscoder's directory, or a Hub id.")]
Out = Annotated[Path | None, typer.Option(help="Where results go; needed where RUN is not a run directory.")]


class Read(StrEnum):
    """Layouts that `convert` reads."""

    auto = "auto"
    ckkissane = "ckkissane"
    dictionary_learning = "dictionary_learning"


class Written(StrEnum):
    """Layouts that `convert` writes."""

    crosscoder = "crosscoder"
    ckkissane = "ckkissane"
    dictionary_learning = "dictionary_learning"


class Tracker(StrEnum):
    """Trackers that `--track` knows."""

    wandb = "wandb"
    tensorboard = "tensorboard"


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"crosscoder {__version__}")
        raise typer.Exit


Version = Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def root(version: Version = None) -> None:
    """Sparse dictionaries over several sources of language models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Train a crosscoder on the two small language models that ship, and tell what fine-tuning changed."""
    with one_screen(CONTINUES):
        from crosscoder.cli.demo import run

        run(out, as_json=as_json)


@app.command()
def train(
    run_file: Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help="The run file.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print parameters, memory, rows and disk.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Only list every key of a run file, and what it means.")] = False,
    track: Annotated[list[Tracker] | None, typer.Option(help="Also send metrics to this tracker.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a crosscoder, or go on where an interrupted run stopped."""
    with one_screen(CONTINUES):
        from crosscoder.cli import train as body

        if keys:
            body.list_keys(as_json=as_json)
        elif run_file is None:
            raise typer.BadParameter("expected a run file.", param_hint="RUN.yaml")
        elif dry_run:
            body.dry_run(run_file, overrides or [], as_json=as_json)
        else:
            body.run(run_file, overrides or [], trackers=[name.value for name in track or []], as_json=as_json)


@app.command()
def evaluate(
    run: Trained,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure a trained crosscoder on the held-out analysis set; writes evaluation.json and tables of latents."""
    with one_screen("Nothing was half-written; run the command again."):
        from crosscoder.cli.evaluate import run as body

        body(run, out=out, as_json=as_json)


@app.command()
def diff(
    run: Trained,
    a: Annotated[str | None, typer.Option("--a", help="One source, or the alias of its model.")] = None,
    b: Annotated[str | None, typer.Option("--b", help="The other one.")] = None,
    labels: Annotated[Path | None, typer.Option(help="labels.jsonl: spans of text where a behaviour acts.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A run whose best latents are scored beside, for --labels.")
    ] = None,
    cutoffs: Annotated[str, typer.Option(help="Where classes begin: default, minder, anthropic or dfc.")] = "default",
    patched: Annotated[int, typer.Option(min=0, help="Contexts that KL patching is run on; 0: none.")] = 32,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Tell what differs between two sources: classes of latents, exemplars, and a report to open in a browser."""
    with one_screen("Nothing was half-written; run the command again."):
        from crosscoder.cli.diff import Question
        from crosscoder.cli.diff import run as body

        body(run, Question(a, b, labels, baseline, cutoffs, patched), out=out, as_json=as_json)


@app.command()
def controls(
    run: Trained,
    overrides: Overrides = None,
    a: Annotated[str | None, typer.Option("--a", help="One source, or the alias of its model.")] = None,
    b: Annotated[str | None, typer.Option("--b", help="The other one.")] = None,
    null: Annotated[
        bool, typer.Option("--null", help="b made up from a, with a difference without structure.")
    ] = False,
    identical: Annotated[bool, typer.Option("--identical", help="b a copy of a.")] = False,
    repeat: Annotated[bool, typer.Option("--repeat", help="The same run with other seeds.")] = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="SAEs of the difference and of each source.")] = False,
    partner: Annotated[
        list[str] | None, typer.Option(metavar="ALIAS=PATH", help="The same run with another model there. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many null pairs, and repeats.")] = 3,
    num_tokens: Annotated[int | None, typer.Option(min=1, help="Rows to train each on; as many as the run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be trained, and on how many rows.")
    ] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train runs to compare with, and calibrate cut-offs on them: what does training alone make of no difference?

    Without a choice, null pairs. They go to RUN/controls; finished ones are not trained again.
    """
    with one_screen(CONTINUES):
        from crosscoder.cli import controls as body

        chosen = {"null": null, "identical": identical, "repeat": repeat, "baselines": baselines}
        changes = [*(overrides or []), *([] if num_tokens is None else [f"train.num_tokens={num_tokens}"])]
        kinds = tuple(name for name, wanted in chosen.items() if wanted)
        asked = body.Asked(a, b, kinds, seeds, tuple(partner or ()), tuple(changes))
        (body.dry_run if dry_run else body.run)(run, asked, out=out, as_json=as_json)


@app.command()
def encode(
    run: Trained,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt: text, or a dialogue as a JSON list of messages. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt with one prompt a line, or a .jsonl of {prompt} or {messages}.")
    ] = None,
    contrast: Annotated[
        Path | None, typer.Option(help="Such a file too: find latents that tell the prompts from those in it.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="In the chat template, or as it stands; chat where there is a template."),
    ] = None,
    latent: Annotated[list[int] | None, typer.Option(help="Only this latent. Repeatable.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Latents to show: per token, per ranking, or of a contrast.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write a page to open in a browser (prompts only).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the active latents of your own prompts, token by token, or which latents tell two sets of prompts apart.

    Without --prompt and --prompts, standard input is one prompt. Every token has its position, who speaks it, and its
    strongest latents as number:value, share of the largest value on the analysis set, and n with the relative norm.
    """
    with one_screen("Nothing was half-written; run the command again."):
        from crosscoder.cli.encode import Asked
        from crosscoder.cli.encode import run as body

        rendering = None if chat is None else "chat" if chat else "raw"
        asked = Asked(tuple(prompt or ()), prompts, contrast, rendering, tuple(latent or ()), top)
        body(run, asked, out=out, as_json=as_json)


@app.command()
def steer(
    run: Trained,
    latent: Annotated[list[int], typer.Option(help="A latent to edit. Repeatable: all are edited together.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt: text, or a dialogue as a JSON list of messages. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt with one prompt a line, or a .jsonl of {prompt} or {messages}.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before every prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Prompts as they stand, without the chat template.")] = False,
    model: Annotated[str | None, typer.Option(help="Alias of the model that speaks; the text's by default.")] = None,
    doses: Annotated[
        str | None,
        typer.Option(
            help="With commas: numbers (that multiple of each latent's largest value is added on every edited token), "
            "ablate, scale=X, clamp=V, add=V (in the latent's units); ablate,-1,0,0.5,1,2,4 if left out."
        ),
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Short for --doses 0,ablate; not beside --doses.")] = False,
    tokens: Annotated[
        str,
        typer.Option(help="What is edited: all, prompt, reply, reply:N (its first), roles or positions with commas."),
    ] = "all",
    source: Annotated[list[str] | None, typer.Option(help="Edit only this source or model. Repeatable.")] = None,
    contains: Annotated[str | None, typer.Option(help="Count replies with this text in them.")] = None,
    regex: Annotated[str | None, typer.Option(help="Count replies in which this regular expression is found.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest reply.")] = 60,
    samples: Annotated[int, typer.Option(min=1, help="Replies a prompt, at temperature 1; one is greedy.")] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Let a model speak with some latents amplified or ablated, dose by dose, with the side effects on other text.

    The untouched model (dose 0) always speaks too. Results go to steer/ in the run, or in --out. Rates against the
    number of latents suppressed, and controls for them, are in Python: interventions.suppression_curve.
    """
    with one_screen("Nothing was half-written; run the command again."):
        from crosscoder.cli import steer as body

        prompted = body.Prompted(tuple(prompt or ()), prompts, system, raw, max_new_tokens, samples)
        asked = body.Doses(tuple(latent), doses, ablate, tokens, tuple(source or ()), model)
        body.run(run, prompted, asked, sign=body.Sign(contains, regex), out=out, as_json=as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file, a directory, or a Hub id owner/name.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    layout: Annotated[Read, typer.Option("--from", help="Whose layout SOURCE has.")] = Read.auto,
    to: Annotated[Written, typer.Option("--to", help="Whose layout to write.")] = Written.crosscoder,
    models: Annotated[
        str | None, typer.Option(help="The file's models in its order: base=google/gemma-2-2b,chat=..., or base,chat.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Where in them: layers.13.resid_post; several with commas.")] = None,
    scales: Annotated[
        str | None, typer.Option(help="What activations were multiplied by, where no file says: base=0.28,chat=0.24.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a crosscoder of another tool into one of ours, or one of ours into another tool's; says what it assumed."""
    with one_screen("Nothing was half-written; run the command again."):
        from crosscoder.cli.convert import Names
        from crosscoder.cli.convert import run as body

        body(source, Names(models, site, scales), out=out, layout=layout.value, to=to.value, as_json=as_json)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The recipe; all are listed without one.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the run file there, instead of printing it.")] = None,
    as_json: AsJson = False,
) -> None:
    """List run files of published set-ups, or print one: crosscoder recipes NAME > run.yaml."""
    with one_screen("Nothing was half-written; run the command again."):
        from crosscoder.cli import recipes as body

        if name is None:
            body.list_recipes(as_json=as_json)
        else:
            body.print_recipe(name, overrides or [], out=out, as_json=as_json)


@app.command()
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask the model hub for an answer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what is missing, and the command that mends it."""
    with one_screen("Nothing was changed."):
        from crosscoder.cli.doctor import run

        run(network=network, as_json=as_json)


def main() -> None:
    """The entry point of the `crosscoder` command."""
    app()
