"""The body of `crosscoder steer`: what a model says at each dose of some latents."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crosscoder.cli.reporting import print_json, print_table, terminal
from crosscoder.cli.steering_options import as_doses, chosen_doses, parse_tokens
from crosscoder.errors import ConfigError, TextError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crosscoder.analysis.opened_run import OpenedRun
    from crosscoder.analysis.prompt_text import Prompt as Content
    from crosscoder.interventions import Behaviour, Prompt, Steering, Subject, Trial, UnrelatedText

MOST_PRINTED = 5
"""Prompts of which the replies are printed; all are in completions.parquet."""
UNRELATED_TOKENS = 3000
STATISTICS = "latents.parquet"
_log = logging.getLogger(__name__)


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
    doses: str | None
    ablate: bool
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
    contents, behaviour = _contents(prompted), _behaviour(sign)
    parsed, tokens = chosen_doses(asked.doses, ablate=asked.ablate), parse_tokens(asked.tokens)
    with terminal() as view:
        from crosscoder.analysis.opened_run import open_run
        from crosscoder.interventions import Sampling, Subject, Trial, steer

        opened = open_run(path, out=out, progress=view)
        _refuse_made_up(opened)
        largest = _largest(opened, asked.latents, needed=any(kind == "max" and value for kind, value in parsed))
        sources = asked.sources or None
        doses = as_doses(opened.crosscoder, parsed, largest, tokens=tokens, sources=sources)
        subject = Subject(opened.crosscoder, opened.models, _speaker(opened, asked), opened.config.text.drop)
        for dose in doses:
            subject.check(dose.edits)
        prompts = _prompts(subject, contents, prompted)
        temperature = None if prompted.num_samples == 1 else 1.0
        sampling = Sampling(prompted.max_new_tokens, prompted.num_samples, temperature, opened.config.seed)
        trial = Trial(subject, tuple(prompts), behaviour, sampling)
        done = steer(trial, doses, unrelated=_unrelated(opened), progress=view)
        told = _Told(done, _request(opened, trial, asked, done), largest)
    place = opened.out / "steer" / told.name
    told.write(place)
    if as_json:
        print_json({"path": str(place), **told.summary()})
    else:
        told.print(place)


def _refuse_made_up(opened: OpenedRun) -> None:
    if opened.made_up:
        raise ConfigError(
            "no model has what edits of a null pair would change: the activations of one of its sources are made up.",
            hint="Steer in the run that it is the control of.",
        )


def _largest(opened: OpenedRun, latents: Sequence[int], *, needed: bool) -> dict[int, float]:
    """Every latent's largest value on the analysis set; NaN where doses do not need it."""
    from crosscoder.analysis.tables import read_table
    from crosscoder.interventions.edits import check_latents

    check_latents(opened.crosscoder, latents)
    if len(set(latents)) < len(latents):
        raise ConfigError(f"expected every latent once; got {', '.join(map(str, latents))}.")
    if not needed:
        return dict.fromkeys(latents, float("nan"))
    homes = [opened.out, *([] if opened.home is None else [opened.home.path])]
    path = next((home / STATISTICS for home in homes if (home / STATISTICS).is_file()), None)
    if path is None:
        raise ConfigError(
            f"doses in multiples of the largest value need {opened.out / STATISTICS}; it is not there.",
            hint="Run `crosscoder evaluate` first, or give values: --doses ablate,add=0.5,scale=2.",
        )
    columns = read_table(path, thing="latents", latents=latents).to_pydict()
    values = dict(zip(columns["latent"], columns["max_value"], strict=True))
    silent = [str(latent) for latent in latents if not values[latent]]
    if silent:
        raise ConfigError(
            f"latents that are never active on the analysis set have no largest value: {', '.join(silent)}.",
            hint="Leave them out, or give values in their own units: --doses add=0.5.",
        )
    return {latent: values[latent] for latent in latents}


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
        _log.warning("nobody is silent in the held-out text: side effects are measured on its dialogues.")
        return UnrelatedText.of(opened.text, num_tokens=UNRELATED_TOKENS, which="all")


def _request(opened: OpenedRun, trial: Trial, asked: Doses, done: Steering) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "prompts": list(done.prompts),
        "latents": list(asked.latents),
        "doses": [dose["dose"] for dose in done.to_json()["doses"]],
        "tokens": asked.tokens,
        "sources": list(asked.sources) or None,
        "speaker": done.speaker,
        "behaviour": done.behaviour,
        "sampling": asdict(trial.sampling),
        "side_effects": {"text": done.measured_on, "num_tokens": UNRELATED_TOKENS, "edited": "every token"},
        "fingerprint": opened.fingerprint,
        "models": {alias: model.identity["weights"] for alias, model in trial.subject.models.items()},
    }


@dataclass(frozen=True)
class _Told:
    """What came of the doses, what was asked for, and the latents with their largest values."""

    done: Steering
    request: dict[str, Any]
    largest: dict[int, float]

    @property
    def name(self) -> str:
        """Of the directory: who speaks, the first latents, and a hash of the whole request."""
        from xxhash import xxh3_64

        latents = "-".join(map(str, list(self.largest)[:4])) + ("-and-more" if len(self.largest) > 4 else "")
        digest = xxh3_64(json.dumps(self.request, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.done.speaker}-{latents}-{digest}"

    def summary(self) -> dict[str, Any]:
        """The request and all figures."""
        return {
            "format": "crosscoder.steering/1",
            "latents": list(self.largest),
            "request": self.request,
            **self.done.to_json(),
        }

    def write(self, place: Path) -> None:
        """Figures, tables and plots."""
        from crosscoder import files
        from crosscoder.analysis.steering_plots import dose_response
        from crosscoder.analysis.tables import write_table

        for name, svg in dose_response(self.done).items():
            with files.replacing(place / f"{name}.svg") as draft:
                draft.write_text(svg + "\n", encoding="utf-8")
        write_table(place / "table.parquet", self.done.table(), thing="steering")
        write_table(place / "completions.parquet", self.done.completions(), thing="completions")
        files.write_json(place / "summary.json", self.summary())

    def print(self, place: Path) -> None:
        """What was done, the replies of the first prompts, and the figures."""
        self._print_head()
        done = self.done
        for number, prompt in enumerate(done.prompts[:MOST_PRINTED]):
            typer.echo(f"\n{_safe(prompt)}")
            for result in done.results:
                for reply in result.replies[number * done.num_samples : (number + 1) * done.num_samples]:
                    typer.echo(f"  {result.dose.name.rjust(9)}  {_safe(reply)}")
        typer.echo()
        self._print_figures()
        typer.echo(f"\nThe files are in {place}.")

    def _print_head(self) -> None:
        others = [alias for alias in self.request["models"] if alias != self.done.speaker]
        beside = f"; {', '.join(others)} clean beside it" if others else ""
        typer.echo(f"{self.done.speaker} speaks{beside}. Edited tokens: {self.request['tokens']}. Dose 0: untouched.")
        if any(result.dose.amount for result in self.done.results):
            units = ", ".join(f"{value:.3g} of {latent}" for latent, value in list(self.largest.items())[:4])
            typer.echo(
                "A number is a multiple of each latent's largest value on the analysis set "
                f"({units}{', ...' if len(self.largest) > 4 else ''}), added on every edited token, active or not."
            )

    def _print_figures(self) -> None:
        done = self.done
        head = ["dose", *([] if done.behaviour is None else [done.behaviour, "95 %"]), "KL", "CE clean", "CE edited"]
        rows: list[list[str]] = []
        for result in done.results:
            rate, aside = result.rate, result.side_effects
            shown = [] if rate is None else [f"{rate.hits}/{rate.total}", f"{rate.low:.0%}–{rate.high:.0%}"]
            beside = [] if aside is None else [f"{aside.kl:.4f}", f"{aside.clean:.3f}", f"{aside.edited:.3f}"]
            rows.append([result.dose.name, *shown, *beside])
        print_table(head, rows)
        every = "" if self.request["tokens"] == "all" else ", edited on every token, which is usually more than above"
        typer.echo(f"KL (clean ‖ edited) and cross-entropy in nats a token, on {done.measured_on}{every}.")
        if done.interval is not None:
            several = "" if done.num_samples == 1 else ": replies of one prompt are not independent"
            typer.echo(f"95 % intervals: {done.interval}{several}.")


def _safe(text: str) -> str:
    """Text on a terminal: on one line, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else " ⏎ " if c == "\n" else c.encode("unicode_escape").decode() for c in text)
