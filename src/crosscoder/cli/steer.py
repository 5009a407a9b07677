"""The body of `crosscoder steer`: what a model says at each dose of some latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crosscoder.cli.reporting import print_json, print_table, terminal
from crosscoder.errors import ConfigError, TextError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crosscoder.analysis.opened_run import OpenedRun
    from crosscoder.analysis.prompt_text import Prompt as Content
    from crosscoder.interventions import Behaviour, Dose, Prompt, Steering, Subject, TokenSelection, UnrelatedText

MOST_PRINTED = 5
"""Prompts of which the replies are printed; all are in completions.parquet."""
UNRELATED_TOKENS = 3000


@dataclass(frozen=True)
class Prompted:
    """What the model is asked, and how."""

    prompts: tuple[str, ...]
    file: Path | None
    system: str | None
    raw: bool
    max_new_tokens: int
    num_samples: int


@dataclass(frozen=True)
class Doses:
    """Which latents are edited, how, where, and on which tokens."""

    latents: tuple[int, ...]
    doses: str
    tokens: str
    sources: tuple[str, ...]
    model: str | None


@dataclass(frozen=True)
class Sign:
    """What is looked for in a reply."""

    contains: str | None
    regex: str | None


def run(path: str, prompted: Prompted, asked: Doses, *, sign: Sign, out: Path | None, as_json: bool) -> None:
    """Steer, print the replies dose by dose, and write figures, tables and plots."""
    contents = _contents(prompted)
    behaviour = _behaviour(sign)
    with terminal() as view:
        from crosscoder.analysis.opened_run import open_run
        from crosscoder.interventions import Sampling, Subject, Trial, steer

        opened = open_run(path, out=path, progress=view)
        doses = _doses(opened, asked)
        subject = Subject(opened.crosscoder, opened.models, _speaker(opened, asked), opened.config.text.drop)
        for dose in doses:
            subject.check(dose.edits)
        prompts = _prompts(subject, contents, prompted)
        temperature = None if prompted.num_samples == 1 else 1.0
        sampling = Sampling(prompted.max_new_tokens, prompted.num_samples, temperature, opened.config.seed)
        trial = Trial(subject, tuple(prompts), behaviour, sampling)
        done = steer(trial, doses, unrelated=_unrelated(opened), progress=view)
    name = "-".join(map(str, asked.latents[:4])) + ("-and-more" if len(asked.latents) > 4 else "")
    place = out or Path(path) / "steer" / f"{subject.speaker}-{name}"
    _write(done, place, asked)
    _tell(done, place, asked, as_json=as_json)


def parse_doses(text: str) -> list[tuple[str, float | None]]:
    """`ablate,scale=2,clamp=1,add=.5,0,1` as pairs of a kind and a value; a bare number is of kind `max`."""
    found: list[tuple[str, float | None]] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        kind, equals, value = part.partition("=")
        if part == "ablate":
            found.append(("ablate", None))
        elif equals and kind in ("scale", "clamp", "add"):
            found.append((kind, _number(value, part)))
        else:
            found.append(("max", _number(part, part)))
    if not found:
        raise ConfigError("expected doses; got none.", hint=_DOSES)
    return found


def parse_tokens(text: str) -> TokenSelection:
    """`all`, `prompt`, `reply`, `reply:5` (its first tokens), positions as `3,4`, or roles as `user,assistant`."""
    from crosscoder.interventions import AllTokens, Positions, PromptTokens, ReplyTokens, Roles

    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    head, colon, first = text.partition(":")
    if parts and all(part.isdigit() for part in parts):
        return Positions(tuple(int(part) for part in parts))
    if head == "reply" and colon:
        return ReplyTokens(first=int(_number(first, text)))
    plain = {"all": AllTokens(), "prompt": PromptTokens(), "reply": ReplyTokens()}
    return plain[text] if text in plain else Roles(parts)


_DOSES = "Write for example --doses ablate,0,1,2,4 (multiples of the largest value), or scale=2, clamp=1.5, add=0.3."


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"expected a dose or a number; got {whole!r}.", hint=_DOSES) from error


def _doses(opened: OpenedRun, asked: Doses) -> list[Dose]:
    from crosscoder.interventions import Dose, ablate, add, clamp, scale
    from crosscoder.interventions.edits import check_latents

    check_latents(opened.crosscoder, asked.latents)
    parsed, latents = parse_doses(asked.doses), asked.latents
    where: Any = {"tokens": parse_tokens(asked.tokens), "sources": asked.sources or None}
    largest = _largest(opened, latents) if any(kind == "max" and value for kind, value in parsed) else ()
    found: list[Dose] = []
    for kind, value in parsed:
        if kind == "ablate" or value is None:
            found.append(Dose("ablate", (ablate(latents, **where),)))
        elif kind == "max":
            edits = (add(latents, [value * most for most in largest], **where),) if value else ()
            found.append(Dose(f"{value:+g}" if value else "0", edits, value))
        else:
            make = {"scale": scale, "clamp": clamp, "add": add}[kind]
            found.append(Dose(f"{kind} {value:g}", (make(latents, value, **where),)))
    return found


def _largest(opened: OpenedRun, latents: Sequence[int]) -> list[float]:
    """The largest values of the latents on the analysis set."""
    from crosscoder.analysis.tables import read_table

    path = opened.out / "latents.parquet"
    if not path.is_file():
        raise ConfigError(
            f"doses in multiples of the largest value need {path}; it is not there.",
            hint="Run `crosscoder evaluate` first, or give values: --doses ablate,add=0.5,scale=2.",
        )
    columns = read_table(path, thing="latents", latents=latents).to_pydict()
    values = dict(zip(columns["latent"], columns["max_value"], strict=True))
    return [values[latent] for latent in latents]


def _speaker(opened: OpenedRun, asked: Doses) -> str:
    """The model asked for, or the one whose tokenizer and template render the run's text."""
    aliases = opened.crosscoder.sources.underlying.models
    own = opened.config.text.tokenizer
    return asked.model or (own if own in aliases else aliases[-1])


def _contents(prompted: Prompted) -> list[Content]:
    from crosscoder.analysis.prompt_text import parse_prompt, read_prompts

    if bool(prompted.prompts) == (prompted.file is not None):
        raise ConfigError(
            "expected --prompt or --prompts, and not both.", hint='Give --prompt "..." or --prompts FILE.'
        )
    given = [parse_prompt(text) for text in prompted.prompts] if prompted.file is None else read_prompts(prompted.file)
    if prompted.system is None:
        return given
    if prompted.raw:
        raise ConfigError("a system message needs the chat template.", hint="Leave out --raw or --system.")
    opening = {"role": "system", "content": prompted.system}
    return [[opening, *([{"role": "user", "content": one}] if isinstance(one, str) else one)] for one in given]


def _prompts(subject: Subject, contents: Sequence[Content], prompted: Prompted) -> list[Prompt]:
    """Rendered as `crosscoder encode` renders them: the same checks of what was typed."""
    from crosscoder.analysis.prompt_text import prompt_text
    from crosscoder.interventions.prompts import Prompt

    answered = [one for one in contents if not isinstance(one, str) and one and one[-1].get("role") == "assistant"]
    if answered:
        raise TextError("a prompt ends with the assistant's reply; it should await one.", hint="Take the reply out.")
    model = subject.model
    room = None if model.max_positions is None else model.max_positions - prompted.max_new_tokens
    rendering = "raw" if prompted.raw or model.tokenizer.chat_template is None else "chat"
    found = prompt_text(contents, model.tokenizer, rendering=rendering, drop=subject.drop, max_tokens=room)
    texts = ["".join(found.pieces[place] for place in found.span(number)) for number in range(found.num_prompts)]
    return [Prompt.of(context, text) for context, text in zip(found.contexts, texts, strict=True)]


def _behaviour(sign: Sign) -> Behaviour | None:
    from crosscoder.interventions import contains, matches

    if sign.contains is not None and sign.regex is not None:
        raise ConfigError("expected --contains or --regex, not both.", hint="A regular expression can do what both do.")
    if sign.regex is not None:
        return matches(sign.regex)
    return None if sign.contains is None else contains(sign.contains)


def _unrelated(opened: OpenedRun) -> UnrelatedText:
    """Plain text of the analysis set; its dialogues where it has nothing else."""
    from crosscoder.interventions import UnrelatedText

    try:
        return UnrelatedText.of(opened.text, num_tokens=UNRELATED_TOKENS)
    except TextError:
        return UnrelatedText.of(opened.text, num_tokens=UNRELATED_TOKENS, which="all")


def _write(done: Steering, place: Path, asked: Doses) -> None:
    from crosscoder import files
    from crosscoder.analysis.steering_plots import dose_response
    from crosscoder.analysis.tables import write_table

    for name, svg in dose_response(done).items():
        with files.replacing(place / f"{name}.svg") as draft:
            draft.write_text(svg + "\n", encoding="utf-8")
    write_table(place / "table.parquet", done.table(), thing="steering")
    write_table(place / "completions.parquet", done.completions(), thing="completions")
    files.write_json(place / "summary.json", _summary(done, asked))


def _summary(done: Steering, asked: Doses) -> dict[str, Any]:
    return {"format": "crosscoder.steering/1", "latents": list(asked.latents), **done.to_json()}


def _tell(done: Steering, place: Path, asked: Doses, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(place), **_summary(done, asked)})
        return
    for number, prompt in enumerate(done.prompts[:MOST_PRINTED]):
        typer.echo(f"{'' if number == 0 else chr(10)}{_safe(prompt)}")
        for result in done.results:
            for reply in result.replies[number * done.num_samples : (number + 1) * done.num_samples]:
                typer.echo(f"  {result.dose.name.rjust(9)}  {_safe(reply)}")
    typer.echo()
    _print_figures(done)
    typer.echo(f"\nThe files are in {place}.")


def _print_figures(done: Steering) -> None:
    head = ["dose", *([] if done.behaviour is None else [done.behaviour, "95 %"]), "KL", "CE clean", "CE edited"]
    rows: list[list[str]] = []
    for result in done.results:
        rate, aside = result.rate, result.side_effects
        shown = [] if rate is None else [f"{rate.hits}/{rate.total}", f"{rate.low:.0%}–{rate.high:.0%}"]
        beside = [] if aside is None else [f"{aside.kl:.4f}", f"{aside.clean:.3f}", f"{aside.edited:.3f}"]
        rows.append([result.dose.name, *shown, *beside])
    print_table(head, rows)
    typer.echo("KL (clean ‖ edited) and cross-entropy in nats a token, on held-out text that is no dialogue.")


def _safe(text: str) -> str:
    """Text on a terminal: on one line, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else " ⏎ " if c == "\n" else c.encode("unicode_escape").decode() for c in text)
