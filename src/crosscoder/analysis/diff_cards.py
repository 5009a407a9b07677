"""The cards of a report: for each latent that is shown its statistics, scores, words, contexts and causal effect."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from crosscoder.analysis.latent_cards import CardEffect, LatentCard
from crosscoder.analysis.logit_lens import logit_lens
from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.analysis.pair import PairStatistics
from crosscoder.analysis.tables import read_table
from crosscoder.analysis.tokens import token_pieces
from crosscoder.errors import SourceMismatch, TokenizerMismatch, UnsupportedSite
from crosscoder.interventions.effects import LatentEffects, effects

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unmeasured:
    """Why something of a diff was not measured."""

    reason: str


@dataclass(frozen=True)
class CardMaker:
    """Makes the cards of one pair; `statistics` is the table of all latents."""

    run: OpenedRun
    pair: PairStatistics
    statistics: pa.Table

    def cards(
        self, latents: Sequence[int], found: LatentEffects | Unmeasured, *, sides: Mapping[int, str]
    ) -> dict[int, LatentCard]:
        """A card for each latent, with the effect of ablating it where that was measured.

        `sides` says of latents shown as one side's which one; others are measured along the side that they lean to.
        """
        exemplars = self._exemplars(latents)
        rows = self.statistics.take(pa.array(latents, pa.int64())).to_pylist()
        promoted, without_lens = self._promoted(latents)
        classes, by_latent = self.pair.classes, self._effects(found)
        fixed = classes.by_wiring.tolist()
        return {
            latent: LatentCard(
                latent=latent,
                relative_norm=float(classes.relative_norm[latent]),
                cosine=None if classes.cosine is None or fixed[latent] else float(classes.cosine[latent]),
                by_wiring=bool(fixed[latent]),
                statistics=row,
                promoted={source: pieces[latent] for source, pieces in promoted.items()},
                exemplars=exemplars[latent],
                without_lens=without_lens,
                measured=self._measured(latent, sides.get(latent)),
                effects=by_latent.get(latent, ()),
            )
            for latent, row in zip(latents, rows, strict=True)
        }

    def measured_effects(self, latents: Sequence[int]) -> LatentEffects | Unmeasured:
        """What ablating each latent does in both models, on its own exemplars; or why that was not measured."""
        run, classes = self.run, self.pair.classes
        sources = [key for key in (classes.a, classes.b) if run.crosscoder.writes[key].difference is None]
        if not latents:
            return Unmeasured("no latent is shown.")
        if run.made_up or not sources:
            return Unmeasured("no model gives one of the sources: it is made up, or a difference.")
        contexts = {n: [row["context"] for row in rows] for n, rows in self._exemplars(latents).items()}
        try:
            return effects(
                run.crosscoder,
                run.models,
                run.text,
                latents=latents,
                sources=sources,
                contexts=contexts,
                progress=run.progress,
            )
        except (SourceMismatch, TokenizerMismatch, UnsupportedSite) as error:
            return Unmeasured(error.message)

    def _exemplars(self, latents: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = {latent: [] for latent in latents}
        for row in read_table(self.run.out / "exemplars.parquet", thing="exemplars", latents=latents).to_pylist():
            found[row["latent"]].append(row)
        return {latent: sorted(rows, key=lambda row: row["rank"]) for latent, rows in found.items()}

    def _promoted(self, latents: Sequence[int]) -> tuple[dict[str, dict[int, list[str]]], dict[str, str]]:
        """Promoted tokens by source and latent; and by source why not, where no head of the model reads it."""
        promoted: dict[str, dict[int, list[str]]] = {}
        without_lens: dict[str, str] = {}
        run, classes = self.run, self.pair.classes
        for key in (classes.a, classes.b) if latents else ():
            source = run.crosscoder.writes[key]
            if source.difference is not None:
                without_lens[key] = f"{key} is a difference of two models, which no head reads"
                continue
            model = run.models[source.model]
            try:
                promoted[key] = logit_lens(run.crosscoder, model, source=key, latents=latents).pieces(model.tokenizer)
            except UnsupportedSite as error:
                log.warning("no logit lens at %s: %s", key, error.message)
                without_lens[key] = error.message
        return promoted, without_lens

    def _measured(self, latent: int, side: str | None) -> dict[str, str]:
        """Scaling along `side` or the side that the latent leans to, and how much stronger it is in b."""
        pair = self.pair
        if pair.reason is not None:
            return {}
        side = side or ("a" if float(pair.classes.relative_norm[latent]) < 0.5 else "b")
        scaled = pair.toward_a if side == "a" else pair.toward_b
        ends = scaled.intervals
        named = {
            f"ν error along {side}": (scaled.nu_error, None if ends is None else ends.nu_error),
            "ν reconstruction": (scaled.nu_reconstruction, None if ends is None else ends.nu_reconstruction),
        }
        said = {
            name: _with_interval(values[latent], _row(interval, latent)) for name, (values, interval) in named.items()
        }
        ratio = float(pair.amplification.own_ratio[latent])
        return {name: text for name, text in said.items() if text} | (
            {} if ratio != ratio else {"in b": f"{2**ratio:.2g} × as strong as in a"}
        )

    def _effects(self, found: LatentEffects | Unmeasured) -> dict[int, list[CardEffect]]:
        if isinstance(found, Unmeasured):
            return {}
        by_latent: dict[int, list[CardEffect]] = {}
        pieces = token_pieces(self.run.tokenizer, {*found.rising.flatten().tolist(), *found.falling.flatten().tolist()})
        for row in found.table().to_pylist():
            if row["kl_active"] is not None:
                by_latent.setdefault(row["latent"], []).append(_card_effect(row, pieces))
        return by_latent


def _card_effect(row: Mapping[str, Any], pieces: Mapping[int, str]) -> CardEffect:
    return CardEffect(
        source=row["source"],
        kl_active=row["kl_active"],
        kl_after=float("nan") if row["kl_after"] is None else row["kl_after"],
        falling=[pieces[token] for token in row["falling"]],
        rising=[pieces[token] for token in row["rising"]],
    )


def _row(interval: Any, latent: int) -> tuple[float, float] | None:
    return None if interval is None else (float(interval[latent, 0]), float(interval[latent, 1]))


def _with_interval(value: Any, ends: tuple[float, float] | None) -> str:
    number = float(value)
    if number != number:
        return ""
    known = ends is not None and ends[0] == ends[0]
    return f"{number:.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if known and ends is not None else "")
