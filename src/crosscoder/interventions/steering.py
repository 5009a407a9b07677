"""Steering: what a model says at one dose of some latents after another, and what the doses do to unrelated text.

A dose adds a multiple of each latent's own largest value on the analysis set, `f'_j = f_j + amount · max f_j`, or
ablates the latents. Dose 0 is the model as it is. Every dose is given the same prompts, and the same seed where replies
are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from crosscoder.errors import ConfigError, TextError
from crosscoder.interventions.behaviour import Behaviour, Rate
from crosscoder.interventions.edits import Edit, ablate, add
from crosscoder.interventions.prompts import Prompt
from crosscoder.interventions.selections import TokenSelection
from crosscoder.interventions.side_effects import SideEffects, UnrelatedText, side_effects
from crosscoder.interventions.subject import Sampling, Subject
from crosscoder.progress import Progress, silent

AMOUNTS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Dose:
    """Edits under a name; `amount` is the multiple of the largest values, where it is one."""

    name: str
    edits: tuple[Edit, ...]
    amount: float | None = None


@dataclass(frozen=True)
class Trial:
    """Prompts that a subject replies to, how, and the behaviour that is looked for in its replies."""

    subject: Subject
    prompts: tuple[Prompt, ...]
    behaviour: Behaviour | None = None
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TextError("expected at least one prompt; got none.")

    def replies(self, edits: Sequence[Edit]) -> list[str]:
        """The replies under edits, sample by sample and prompt by prompt."""
        return self.subject.replies(self.prompts, edits, self.sampling)

    def rate(self, edits: Sequence[Edit]) -> Rate:
        """How often the behaviour shows under edits."""
        return self.counted(self.replies(edits))

    def counted(self, replies: Sequence[str]) -> Rate:
        """How often the behaviour shows in replies."""
        if self.behaviour is None:
            raise ConfigError(
                "a rate needs a behaviour to count.", hint="Give behaviour=contains(...) or matches(...)."
            )
        shown = (self.behaviour.shows(reply) for reply in replies)
        return Rate.over_prompts(shown, num_samples=self.sampling.num_samples, seed=self.sampling.seed)


@dataclass(frozen=True)
class DoseResult:
    """What came of one dose."""

    dose: Dose
    replies: tuple[str, ...]
    rate: Rate | None
    side_effects: SideEffects | None


@dataclass(frozen=True)
class Steering:
    """What came of every dose; the replies of a dose are all samples of the first prompt, then of the next."""

    speaker: str
    prompts: tuple[str, ...]
    behaviour: str | None
    num_samples: int
    results: tuple[DoseResult, ...]

    @property
    def measured_on(self) -> str | None:
        """The text that side effects were measured on; None where they were not."""
        return next((r.side_effects.text for r in self.results if r.side_effects is not None), None)

    @property
    def interval(self) -> str | None:
        """How the rates' 95 % intervals were found; None without a behaviour."""
        found = dict.fromkeys(r.rate.interval for r in self.results if r.rate is not None)
        return ", ".join(found) or None

    def table(self) -> pa.Table:
        """One row per dose: rate with interval, and side effects."""
        return pa.Table.from_pylist([_row(result) for result in self.results], schema=_SCHEMA)

    def to_json(self, *, num_examples: int = 3) -> dict[str, Any]:
        """All figures, and the replies to the first prompts."""
        return {
            "speaker": self.speaker,
            "behaviour": self.behaviour,
            "num_prompts": len(self.prompts),
            "num_samples": self.num_samples,
            "interval": self.interval,
            "side_effects_on": self.measured_on,
            "doses": [{**_row(result), "edits": [_described(e) for e in result.dose.edits]} for result in self.results],
            "examples": [
                {"prompt": prompt, "replies": {r.dose.name: r.replies[i * self.num_samples] for r in self.results}}
                for i, prompt in enumerate(self.prompts[:num_examples])
            ],
        }

    def completions(self) -> pa.Table:
        """One row per dose, prompt (its number and its text as the model read it) and sample: the reply."""
        rows = [
            {"dose": result.dose.name, "prompt": number // self.num_samples, "sample": number % self.num_samples,
             "prompt_text": self.prompts[number // self.num_samples], "reply": reply}
            for result in self.results
            for number, reply in enumerate(result.replies)
        ]  # fmt: skip
        return pa.Table.from_pylist(rows)


def doses(
    latents: Sequence[int],
    largest: Sequence[float],
    *,
    amounts: Sequence[float] = AMOUNTS,
    tokens: TokenSelection | None = None,
    sources: Sequence[str] | None = None,
) -> list[Dose]:
    """Ablation, and each latent's `largest` value times every amount, added."""
    if len(largest) != len(latents):
        raise ConfigError(f"expected the largest value of each of {len(latents)} latents; got {len(largest)}.")
    found = [Dose("ablate", (ablate(latents, tokens=tokens, sources=sources),))]
    for amount in amounts:
        values = [amount * value for value in largest]
        edits = () if amount == 0 else (add(latents, values, tokens=tokens, sources=sources),)
        found.append(Dose(f"{amount:+g}" if amount else "0", edits, amount))
    return found


def steer(
    trial: Trial, doses: Sequence[Dose], *, unrelated: UnrelatedText | None = None, progress: Progress = silent
) -> Steering:
    """The replies to all prompts at every dose, the rate of the behaviour, and side effects on `unrelated` text."""
    for dose in doses:
        trial.subject.check(dose.edits)
    results: list[DoseResult] = []
    for done, dose in enumerate(doses):
        progress("steering", done, len(doses))
        replies = trial.replies(dose.edits)
        rate = None if trial.behaviour is None else trial.counted(replies)
        aside = None if unrelated is None else side_effects(trial.subject, unrelated, dose.edits)
        results.append(DoseResult(dose, tuple(replies), rate, aside))
    progress("steering", len(doses), len(doses))
    return Steering(
        speaker=trial.subject.speaker,
        prompts=tuple(prompt.text for prompt in trial.prompts),
        behaviour=None if trial.behaviour is None else trial.behaviour.name,
        num_samples=trial.sampling.num_samples,
        results=tuple(results),
    )


_SCHEMA = pa.schema(
    [("dose", pa.string()), ("amount", pa.float64()), ("hits", pa.int64()), ("total", pa.int64())]
    + [(name, pa.float64()) for name in ("rate", "rate_low", "rate_high", "ce_clean", "ce_edited", "kl")]
)


def _row(result: DoseResult) -> dict[str, Any]:
    rate, aside = result.rate, result.side_effects
    row: dict[str, Any] = {"dose": result.dose.name, "amount": result.dose.amount, "total": len(result.replies)}
    if rate is not None:
        row |= {"hits": rate.hits, "rate": rate.share, "rate_low": rate.low, "rate_high": rate.high}
    if aside is not None:
        row |= {"ce_clean": aside.clean, "ce_edited": aside.edited, "kl": aside.kl}
    return row


def _described(edit: Edit) -> dict[str, Any]:
    return {**asdict(edit), "tokens": repr(edit.tokens)}
