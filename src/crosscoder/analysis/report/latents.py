"""The latents themselves: cards of the most specific ones, and of those that find planted behaviours."""

from __future__ import annotations

from collections.abc import Sequence

from crosscoder.analysis.markup import plain, section
from crosscoder.analysis.report.data import ReportData


def named(data: ReportData) -> str:
    """Best latents of labels that are not among the most specific ones."""
    cards = "".join(data.cards[i].html(side="shared", number_of_exemplars=data.exemplars_per_card) for i in data.named)
    return section("Latents that find the planted behaviours best", cards, identity="named") if cards else ""


def latents(data: ReportData, side: str, latents: Sequence[int]) -> str:
    name = plain(data.classes.a if side == "a" else data.classes.b)
    cards = "".join(
        data.cards[latent].html(side=side, number_of_exemplars=data.exemplars_per_card) for latent in latents
    )
    note = (
        f"The {len(latents)} live latents with the most extreme relative norms on this side, whether or not they pass "
        "a cut-off. Each line is the largest value in one context; the outlined token has it. Promoted tokens are a "
        "logit lens: what the decoder row says through the final norm and head, later layers skipped."
    )
    return section(
        f'Most specific to <span class="side-{side}">{name}</span>', cards, identity=f"most-{side}", note=note
    )
