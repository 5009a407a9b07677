"""The causal effect of single latents: what a model predicts without one, where it is most active.

On the contexts in which latent j is most active, at every row on which it is active,

    x'_s = x_s − f_j d_j^s        raw space: exactly j's own contribution is taken away, the error stays

and the rest of the model runs on it. Per latent, over those contexts:

    KL(p ‖ p')                 at the rows on which j is active, and at the other positions up to `window` behind one
    change of cross-entropy    CE' − CE of the true next token, at the same two kinds of positions
    change of probability      p' − p of every token, mean over the active rows: who rises and who falls without j

Deviations from published ablations (Minder et al. 2025): the vector is in raw space whatever the normaliser, and the
model's own error is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.vocabularies import require_one_vocabulary
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError
from crosscoder.interventions.ablations import ACTIVE, AFTER, Sums, ablate_each, batched, jobs
from crosscoder.interventions.firings import Firings, firings_in, strongest_firings
from crosscoder.interventions.reading import BLOCK_TOKENS, checked_latents, written_site
from crosscoder.progress import Progress, silent
from crosscoder.sources import Source

MEASURES = ("kl_active", "kl_after", "ce_change_active", "ce_change_after")
_LATENTS = 32
"""Latents whose changes of probability (latents × vocabulary) are held at once."""


@dataclass(frozen=True)
class EffectsPlan:
    """How much is run: contexts per latent, positions behind an active row, tokens to name, tokens of a forward."""

    num_contexts: int = 10
    window: int = 16
    num_tokens: int = 5
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True)
class LatentEffects:
    """Effects of ablating each latent in each source's model: nats, and changes of probability.

    NaN where a latent is active nowhere, or cannot write the source. `rising` and `falling` are token ids, the
    strongest first; what falls without a latent is what it speaks for. They say nothing where `kl_active` is NaN: the
    table has empty lists there.
    """

    sources: tuple[str, ...]
    latents: Int[Tensor, "latents"]
    num_contexts: Int[Tensor, "latents"]
    num_active: Int[Tensor, "latents"]
    kl_active: Float[Tensor, "latents sources"]
    kl_after: Float[Tensor, "latents sources"]
    ce_change_active: Float[Tensor, "latents sources"]
    ce_change_after: Float[Tensor, "latents sources"]
    rising: Int[Tensor, "latents sources tokens"]
    rising_change: Float[Tensor, "latents sources tokens"]
    falling: Int[Tensor, "latents sources tokens"]
    falling_change: Float[Tensor, "latents sources tokens"]

    def table(self) -> pa.Table:
        """One row per latent and source."""
        counts = {"latent": self.latents, "num_contexts": self.num_contexts, "num_active": self.num_active}
        tokens = {"rising": pa.int32(), "rising_change": pa.float32(), "falling": pa.int32()}
        tokens |= {"falling_change": pa.float32()}
        repeated = {name: values.repeat_interleave(len(self.sources)).tolist() for name, values in counts.items()}
        return pa.table(
            {
                **{name: pa.array(values, pa.int32()) for name, values in repeated.items()},
                "source": list(self.sources) * len(self.latents),
                **{name: pa.array(_or_none(getattr(self, name)), pa.float64()) for name in MEASURES},
                **{name: pa.array(self._listed(name), pa.list_(kind)) for name, kind in tokens.items()},
            }
        )

    def _listed(self, name: str) -> list[list[float]]:
        """Tokens, or their changes, row by row; none where nothing was measured."""
        rows, known = getattr(self, name).flatten(0, 1).tolist(), self.kl_active.isfinite().flatten().tolist()
        return [row if measured else [] for row, measured in zip(rows, known, strict=True)]


@torch.no_grad()
def effects(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    latents: Sequence[int],
    sources: Sequence[str],
    contexts: Mapping[int, Sequence[int]] | None = None,
    plan: EffectsPlan = EffectsPlan(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> LatentEffects:
    """What ablating each of `latents` does at each of `sources`, in the model of that source.

    `contexts` names, for every latent, the contexts of `text` that it is most active in (exemplars, best first);
    without it they are looked for, which costs a pass over the text. Two sources, of two models, tell whether a latent
    does the same in both.
    """
    chosen = checked_latents(crosscoder, latents)
    places = [written_site(crosscoder, models, name) for name in sources]
    require_one_vocabulary(crosscoder.sources, models)
    if not len(chosen) or not places:
        raise EditError("expected at least one latent and one source to measure effects of; got none.")
    firings = _firings(crosscoder, models, text, latents=chosen, contexts=contexts, plan=plan, progress=progress)
    work = _Work(crosscoder, text, chosen, firings, plan)
    parts = [work.at(models[source.model], source, progress) for source in places]
    pairs = torch.stack([firings.place, firings.context]).unique(dim=1)[0]
    return LatentEffects(
        sources=tuple(source.key for source in places),
        latents=chosen,
        num_contexts=pairs.bincount(minlength=len(chosen)),
        num_active=firings.place.bincount(minlength=len(chosen)),
        **{name: torch.stack([part[name] for part in parts], dim=1) for name in parts[0]},
    )


def _firings(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    latents: Int[Tensor, "latents"],
    contexts: Mapping[int, Sequence[int]] | None,
    plan: EffectsPlan,
    progress: Progress,
) -> Firings:
    tokens = plan.block_tokens
    if contexts is not None:
        named = {latent: list(contexts.get(latent, ()))[: plan.num_contexts] for latent in latents.tolist()}
        return firings_in(crosscoder, models, text, contexts=named, block_tokens=tokens, progress=progress)
    return strongest_firings(
        crosscoder,
        models,
        text,
        latents=latents,
        num_contexts=plan.num_contexts,
        block_tokens=tokens,
        progress=progress,
    )


@dataclass(frozen=True)
class _Work:
    """Which latents are ablated, and where."""

    crosscoder: Crosscoder
    text: AnalysisSet
    latents: Int[Tensor, "latents"]
    firings: Firings
    plan: EffectsPlan

    def at(self, model: StudiedModel, source: Source, progress: Progress) -> dict[str, Tensor]:
        """Every measure at one source; NaN for latents that cannot write it."""
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(self.latents), _LATENTS):
            parts.append(self._some(model, source, first))
            progress(f"ablating latents in {source.model}", min(first + _LATENTS, len(self.latents)), len(self.latents))
        found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        cc = self.crosscoder
        silent_here = ~torch.from_numpy(cc.wiring.writes_mask)[self.latents, cc.writes.index(source.key)]
        for values in found.values():
            if values.is_floating_point():
                values[silent_here] = torch.nan
        return found

    def _some(self, model: StudiedModel, source: Source, first: int) -> dict[str, Tensor]:
        """Some latents from `first` on."""
        latents = self.latents[first : first + _LATENTS]
        directions = self.crosscoder.decoder_rows(source.key, "raw")[latents.to(self.crosscoder.mean.device)]
        own = self.firings.of_places(first, len(latents))
        sums = Sums(len(latents), model.model.config.get_text_config().vocab_size)
        for block in batched(jobs(own, self.text, window=self.plan.window), most_tokens=self.plan.block_tokens):
            ablate_each(model, source.site, block, directions=directions, window=self.plan.window, sums=sums)
        return _measures(sums, self.plan.num_tokens)


def _measures(sums: Sums, num_tokens: int) -> dict[str, Tensor]:
    kl, ce = sums.kl / sums.num_kl, sums.ce_change / sums.num_ce
    change = sums.probability / sums.num_kl[:, ACTIVE, None]
    rising, falling = change.topk(num_tokens), (-change).topk(num_tokens)
    return {
        "kl_active": kl[:, ACTIVE],
        "kl_after": kl[:, AFTER],
        "ce_change_active": ce[:, ACTIVE],
        "ce_change_after": ce[:, AFTER],
        "rising": rising.indices,
        "rising_change": rising.values,
        "falling": falling.indices,
        "falling_change": -falling.values,
    }


def _or_none(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.flatten().tolist()]
