"""The latents themselves: cards of those that survive, find planted behaviours, or were turned up or down."""

from __future__ import annotations

from collections.abc import Sequence

from crosscoder.analysis.markup import plain, section
from crosscoder.analysis.report.data import ReportData
from crosscoder.analysis.survivors import NUM_SHOWN, Survivors

_READ = (
    "Each line is the largest value in one context; the outlined token has it. Promoted tokens are a logit lens: what "
    "the decoder row says through the final norm and head, later layers skipped."
)
_SCORES = {"scaling": "specificity by latent scaling", "norm": "specificity by norm"}


def named(data: ReportData) -> str:
    """Best latents of labels that are not among the most specific ones."""
    return _cards(data, data.named, "Latents that find the planted behaviours best", "named")


def changed(data: ReportData) -> str:
    """The most amplified and attenuated latents that are not shown above."""
    return _cards(data, data.changed, "Latents that were turned up or down most", "changed")


def fixed(data: ReportData) -> str:
    """Latents that the wiring gives to one side alone, the most used ones: no finding that they are there."""
    title = "Latents that the wiring gives to one model alone"
    return _cards(data, data.by_wiring, title, "by-wiring")


def latents(data: ReportData, side: str) -> str:
    """The latents of one side that survive; without controls the most extreme ones, and the note says so."""
    found = data.most.get(side)
    if found is None:
        return ""
    name = plain(data.classes.a if side == "a" else data.classes.b)
    shown = [latent for latent in found.latents if latent in data.cards][:NUM_SHOWN]
    title = f'{"Specific" if found.survive else "Most specific"} to <span class="side-{side}">{name}</span>'
    body = _html(data, shown, side=side) or "<p>None.</p>"
    return section(title, body, identity=f"most-{side}", note=_note(found, len(shown)))


def _note(found: Survivors, num_shown: int) -> str:
    if found.calibrated is None:
        return (
            f"The {num_shown} latents with the largest {_SCORES[found.score]} for this side. There are no controls, so "
            f"that nothing says how many of them a pair without any difference would show. {_READ}"
        )
    cut = found.calibrated.cut
    shown = "" if num_shown == len(found.latents) else f" The first {num_shown} are shown."
    return (
        f"{len(found.latents):,} latents lie beyond the cut-off {cut.value:.3f} of {_SCORES[found.score]}; "
        f"{found.calibrated.by_chance}.{shown} {_READ}"
    )


def _cards(data: ReportData, chosen: Sequence[int], title: str, identity: str) -> str:
    return section(title, _html(data, chosen, side="shared"), identity=identity) if chosen else ""


def _html(data: ReportData, chosen: Sequence[int], *, side: str) -> str:
    return "".join(data.cards[i].html(side=side, number_of_exemplars=data.exemplars_per_card) for i in chosen)
