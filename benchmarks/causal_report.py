"""The report of `causal.py`: verdicts from the figures, what fails said plainly, curves as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verdicts import interval

from crosscoder.analysis.steering_plots import against_count
from crosscoder.interventions.suppression import answer

KINDS = {"repeated attribution": "b", "attribution": "a", "difference": "shared", "labels": "other"}
MOST_LOST = 0.1
"""What a control may take from a behaviour."""
Point = dict[str, Any]

HEAD = """# Do the latents of a planted behaviour cause it?

{date}. `crosscoder demo` trained a crosscoder of `base` and `chat` ({num_latents:,} latents, {live:,} of them live,
one layer); this is `benchmarks/causal.py` on that run: {machine}, {minutes} minutes. Greedy replies of {new_tokens}
tokens to single questions. Latents are ranked, sets pruned and doses found on questions of the templates that
training used ({choosing} questions, {told} for attribution); every rate below is on {prompts} held-out questions of
each kind. KL (clean ‖ edited) is the mean over {kl_tokens:,} tokens of held-out books. Edits are in `chat`, on every
token but BOS. As the partner runs clean beside the model that speaks, an edit of both models at once changes the
replies of `chat` by nothing more. Intervals are Wilson's at 95 %; of several random sets, t intervals of
the mean over sets, since replies under one set stand or fall together (where all sets came out the same, Wilson's of
one). A control holds if *no* set of it takes more than ten points; sets that miss the KL wanted by more than a
quarter are named.
*Kept* is the share of held-out look-alikes whose replies begin with the same four words as without the edit.
"""


@dataclass(frozen=True)
class OverSets:
    """The rates of several sets: replies of one set stand or fall together, so that sets are what is counted."""

    rates: tuple[float, ...]
    low: float
    high: float
    lowest: float
    highest: float
    kl: str

    @classmethod
    def of(cls, points: Sequence[Point]) -> OverSets:
        """Of one set, or several that came out the same, Wilson's of one's replies; else a t interval over sets.

        `lowest` and `highest` are the ends of the sets' own intervals.
        """
        rates = tuple(p["rate"] for p in points)
        low, high = min(p["kl"] for p in points), max(p["kl"] for p in points)
        span = f"{low:.4f}" if len(points) == 1 else f"{low:.4f}–{high:.4f}"
        alike = len(set(rates)) == 1
        over_sets = interval(rates)
        return cls(
            rates=rates,
            low=points[0]["low"] if alike else max(over_sets.low, 0.0),
            high=points[0]["high"] if alike else min(over_sets.high, 1.0),
            lowest=min(p["low"] for p in points),
            highest=max(p["high"] for p in points),
            kl=span,
        )

    @property
    def share(self) -> float:
        """The mean over sets."""
        return sum(self.rates) / len(self.rates)

    @property
    def text(self) -> str:
        """The mean with its interval, and each set's own rate where there are several."""
        mean = f"{self.share:.1%} ({self.low:.1%}–{self.high:.1%})"
        return mean if len(self.rates) == 1 else f"{mean}; sets {', '.join(f'{rate:.1%}' for rate in self.rates)}"


def as_markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [HEAD.format(**result["about"], **result["about"]["options"])]
    verdicts = [line for name, found in result["behaviours"].items() for line in _verdicts(name, found)]
    parts += ["## What holds, and what fails\n", "\n".join(verdicts), ""]
    for name, found in result["behaviours"].items():
        parts += [_section(name, found)]
    parts.append(LIMITS)
    return "\n".join(parts)


def figures(result: dict[str, Any]) -> dict[str, str]:
    """The suppression curves of every behaviour, by ranking."""
    return {
        f"causal-{name}.svg": against_count(
            {
                KINDS[ranking]: [(p["num_latents"], p["rate"], p["low"], p["high"]) for p in points]
                for ranking, points in found["choosing"].items()
            },
            title=f"{name}: rate against the number of latents suppressed",
            y_label=f"{name} rate",
        )
        for name, found in result["behaviours"].items()
    }


def _verdicts(name: str, found: dict[str, Any]) -> Iterator[str]:
    """One line for each claim, with its figures."""
    parts = {key: OverSets.of(points) for key, points in found["suppression"].items() if key != "chosen"}
    untouched, chosen = parts.pop("untouched"), OverSets.of(found["suppression"]["chosen"][:1])
    drop = untouched.share - chosen.share
    yield _line(drop >= 0.5, f"**{name}**, suppressed: {untouched.share:.1%} → {chosen.text}, KL {chosen.kl}")
    for key, control in parts.items():
        mean, worst = (untouched.share - rate for rate in (control.share, min(control.rates)))
        over = sum(untouched.share - rate > MOST_LOST for rate in control.rates)
        yield _line(
            over == 0 and mean <= MOST_LOST and control.lowest > chosen.high,
            f"**{name}**, control *{key}*: {over} of {len(control.rates)} sets take more than ten points; the mean "
            f"falls by {100 * mean:.1f}, the worst by {100 * worst:.1f}, to {control.text}; KL {control.kl}"
            f"{_missed(key, found)}",
        )
    kept = {key: [p["kept"] for p in points if "kept" in p] for key, points in found["suppression"].items()}
    mine, matched = kept["chosen"], kept["as many, density and norm matched"]
    if mine and matched:
        yield _line(
            mine[0] >= 1 - MOST_LOST,
            f"**{name}**, suppressed, leaves look-alikes' replies as they were: {mine[0]:.1%} of them, "
            f"{matched[0]:.1%} under a matched set",
        )
    held = found["amplification"]["held_out"]
    before, after = OverSets.of(held["untouched"]), OverSets.of(held["chosen"])
    alike = OverSets.of(held["as many, density and norm matched"])
    yield _line(
        after.low > before.high and after.low > alike.highest,
        f"**{name}**, amplified on look-alikes: {before.share:.1%} → {after.text}, KL {after.kl}; as many matched "
        f"latents {alike.text}",
    )


def _missed(key: str, found: dict[str, Any]) -> str:
    """How many random sets are further than a quarter from the KL that they were to reach."""
    chosen = found["suppression"]["chosen"][0]["kl"]
    wanted = chosen if key == "random, KL of the chosen" else float(key.split()[-1]) if ", KL " in key else None
    off = [p["kl"] for p in found["suppression"][key] if wanted is not None and abs(p["kl"] - wanted) > wanted / 4]
    reached = ", ".join(f"{kl:.2g}" for kl in off)
    return f" (of the sets {len(off)} off {wanted:.2g} by more than a quarter: {reached})" if off else ""


def _line(holds: bool, text: str) -> str:
    return f"- {'holds' if holds else '**FAILS**'}: {text}"


def _section(name: str, found: dict[str, Any]) -> str:
    pruned, dose = found["pruned"], found["amplification"]
    smallest = (
        "no set on the curve reached the target" if pruned is None else f"{len(pruned)} latents ({answer(len(pruned))})"
    )
    rows = [
        (key, str(point["num_latents"]), f"{point['rate']:.1%}", f"{point['low']:.1%}–{point['high']:.1%}",
         f"{point['kl']:.4f}", f"{point['kept']:.1%}" if "kept" in point else "")
        for key, points in found["suppression"].items()
        for point in points
    ]  # fmt: skip
    curves = [(ranking, *_curve(points)) for ranking, points in found["choosing"].items()]
    doses = [
        (key, f"{p['amount']:g}", str(p["num_latents"]), f"{p['rate']:.1%}", f"{p['low']:.1%}–{p['high']:.1%}",
         f"{p['kl']:.4f}")
        for key, points in dose["held_out"].items()
        for p in points
    ]  # fmt: skip
    parts = [
        f"## {name.capitalize()}\n",
        f"Smallest set that suffices, pruned from the curve on the choosing side: {smallest}.\n",
        f"![{name}: rate against the number of latents](causal-{name}.svg)\n",
        "Rate on the choosing side against the number of latents, by ranking:\n",
        _table(("ranking", "rate (KL) at number of latents"), [(key, "; ".join(cells)) for key, *cells in curves]),
        "Suppressed, held out:\n",
        _table(("set", "latents", "rate", "95 %", "KL", "look-alikes' replies kept"), rows),
        "Replies to held-out questions without the pruned set:\n",
        _quoted(found["suppressed_examples"]),
        f"Amplified on look-alikes, held out: *{dose['set']}* at {dose['amount']:g} times each largest value.\n",
        _table(("set", "dose", "latents", "rate", "95 %", "KL"), doses),
        _quoted(dose["examples"]),
        _latents(found["latents"]),
    ]
    return "\n".join(parts)


def _quoted(examples: Sequence[dict[str, str]]) -> str:
    return "\n>\n".join(f"> *{e['asked']}* — {e['reply']}" for e in examples) + "\n"


def _curve(points: Sequence[Point]) -> Iterator[str]:
    for p in points:
        yield f"{p['num_latents']}: {p['rate']:.0%} ({p['kl']:.3f})"


def _latents(cards: Sequence[Point]) -> str:
    roles = ("text", "user", "assistant", "template")
    rows = [
        (str(c["latent"]), f"{c['relative_norm']:.2f}", *(f"{c[f'density_{role}']:.2%}" for role in roles))
        for c in cards[:12]
    ]
    more = f"\n... and {len(cards) - 12} more.\n" if len(cards) > 12 else ""
    return _table(("latent", "relative norm", *(f"density {role}" for role in roles)), rows) + more


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


LIMITS = """## Limits

One crosscoder, one seed, one pair of small models. Questions are single: without the dialogue before them. The pruned
set is minimal in the order tried, not the smallest. A reply counts as a refusal
when it says *refuse*, *not help*, *sorry*, *harm* or *hurt* anywhere, so that broken text counts as none: read the
examples. An ablated set takes away what
its latents do elsewhere too, of which KL on books shows one part.
"""
