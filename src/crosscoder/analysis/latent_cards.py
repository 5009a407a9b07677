"""Cards of single latents: where they lie between a and b, what they promote, and where they are most active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from crosscoder.activations import ROLES
from crosscoder.analysis.markup import plain, visible
from crosscoder.analysis.plots import dial

LEVELS = 8


@dataclass(frozen=True)
class CardEffect:
    """What ablating the latent does to one model: KL in nats where it is active and after, and tokens that it moves."""

    source: str
    kl_active: float
    kl_after: float
    falling: Sequence[str]
    rising: Sequence[str]


@dataclass(frozen=True)
class LatentCard:
    """All that is shown of one latent; `exemplars` are rows of exemplars.parquet, `promoted` is by source.

    `without_lens` says of a source why nothing is promoted there; `measured` are further numbers by name.
    """

    latent: int
    relative_norm: float
    cosine: float | None
    statistics: Mapping[str, Any]
    promoted: Mapping[str, Sequence[str]]
    exemplars: Sequence[Mapping[str, Any]]
    without_lens: Mapping[str, str]
    by_wiring: bool = False
    measured: Mapping[str, str] = field(default_factory=dict)
    effects: Sequence[CardEffect] = ()

    def html(self, *, side: str, number_of_exemplars: int) -> str:
        """The card; `side` is the colour class: a, b or shared."""
        shown = self.exemplars[:number_of_exemplars]
        lens = "".join(_lens(source, pieces) for source, pieces in self.promoted.items())
        lens += "".join(_no_lens(source, reason) for source, reason in self.without_lens.items())
        lens += "".join(map(_effect, self.effects))
        items = "".join(_exemplar(row, top=float(self.statistics["max_value"])) for row in shown)
        place = dial(min(1.0, max(0.0, self.relative_norm)), title=f"relative norm {self.relative_norm:.3f}")
        return (
            f'<article class="{side}" id="latent-{self.latent}"><header><h3>Latent {self.latent}</h3>{place}'
            f'<span class="facts">{self._facts()}</span></header>{lens}<ol class="exemplars">{items}</ol></article>'
        )

    def _facts(self) -> str:
        s = self.statistics
        facts = [f"relative norm {self.relative_norm:.3f}"]
        facts += ["by its wiring"] if self.by_wiring else []
        facts += [] if self.cosine is None else [f"cosine {self.cosine:.2f}"]
        facts += [f"active on {percent(s['density'])} of rows", f"largest value {s['max_value']:.3g}"]
        by_role = sorted(((s[f"density_{role}"], role) for role in ROLES), reverse=True)
        most = ", ".join(f"{role} {percent(density)}" for density, role in by_role[:2] if density > 0)
        measured = [f"{plain(name)} {plain(value)}" for name, value in self.measured.items()]
        return " · ".join([*facts, *([most] if most else []), *measured])


def percent(share: float) -> str:
    """A share as people read it: two digits, however small."""
    if share == 0 or share >= 0.1:
        return f"{share:.0%}"
    return f"{100 * share:.2g} %".replace(" %", "%")


def highlighted(pieces: Sequence[str], values: Sequence[float | None], *, peak: int, top: float) -> str:
    """Tokens with their values as background; `peak` is the index of the largest, None values are tokens left out."""
    spans: list[str] = []
    for place, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        level = 0 if not value or top <= 0 else min(LEVELS, 1 + int(LEVELS * value / top))
        kinds = [f"h{level}"] if level else []
        kinds += ["peak"] if place == peak else []
        kinds += ["dropped"] if value is None else []
        title = "not read" if value is None else f"{value:.3g}"
        text = visible(piece) or '<span class="sign">∅</span>'
        spans.append(
            f'<span class="{" ".join(kinds)}" title="{title}">{text}</span>' if kinds else f"<span>{text}</span>"
        )
    return "".join(spans)


def _exemplar(row: Mapping[str, Any], *, top: float) -> str:
    where = f"{row['value']:.3g} · {plain(row['role'])}<br>context {row['context']}, {row['position']}"
    peak = row["position"] - row["first_position"]
    text = highlighted(row["pieces"], row["values"], peak=peak, top=top)
    return f'<li><span class="where">{where}</span><p class="text">{text}</p></li>'


def _lens(source: str, pieces: Sequence[str]) -> str:
    tokens = "".join(f'<span class="piece">{visible(piece)}</span>' for piece in pieces)
    return f'<p class="lens"><b>{plain(source)} promotes</b>{tokens}</p>'


def _no_lens(source: str, reason: str) -> str:
    return f'<p class="lens"><b>{plain(source)} has no logit lens</b>{plain(reason)}</p>'


def _effect(effect: CardEffect) -> str:
    if not isfinite(effect.kl_active):
        return ""
    moved = "".join(
        f'<span class="how">{how}</span>' + "".join(f'<span class="piece">{visible(piece)}</span>' for piece in pieces)
        for how, pieces in (("falls", effect.falling), ("rises", effect.rising))
        if pieces
    )
    after = f", {effect.kl_after:.2g} after" if isfinite(effect.kl_after) else ""
    return (
        f'<p class="lens"><b>{plain(effect.source)} without it</b>'
        f"KL {effect.kl_active:.2g} nats where it is active{after}{moved}</p>"
    )
