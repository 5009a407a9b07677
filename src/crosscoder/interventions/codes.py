"""Where the code comes from while a model runs edited.

A crosscoder of several models reads them all on the same tokens. While one model runs, each of the others runs beside
it on the tokens that it is given, clean, with a key-value cache of its own. Of the running model itself, the reads come

    from the running activations   where every group of an edited latent has read all that it reads of this model when
                                   the first of its edited writes is reached
    from a clean forward           of the same tokens, with its own cache, where it has not: the code of what lies
                                   deeper is not known yet when a shallow site is edited

`code_rule` says which. With a single layer the two are the same. Under the first rule a latent of a deep layer that an
edit at a shallow one changed is seen as changed, as in the replacement model; under the second the code is the one that
the unedited model would have had on these tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.capture.models import Forward, StudiedModel
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, SourceMismatch, TokenizerMismatch
from crosscoder.interventions.edits import Edit
from crosscoder.nonlinearities import TopK
from crosscoder.sources import Source, site_order

Rule = Literal["running", "clean"]


def code_rule(crosscoder: Crosscoder, edits: Sequence[Edit], model: str) -> Rule:
    """Whether the reads of `model`, while it runs, are its running activations or those of a clean forward."""
    reading = [edit for edit in edits if edit.reads_code]
    for edit in reading:
        for source in (source for source in edit.edited_sources(crosscoder) if source.model == model):
            for group in _groups(crosscoder, edit.latents, writing=source.key):
                reads = _underlying(
                    crosscoder, [key for number in group for key in crosscoder.wiring.groups[number].reads]
                )
                if any(read.model == model and site_order(read.site) > site_order(source.site) for read in reads):
                    return "clean"
    return "running"


class Reads:
    """What the crosscoder reads, in one forward pass of one model after another."""

    def __init__(
        self, crosscoder: Crosscoder, models: Mapping[str, StudiedModel], edits: Sequence[Edit], running: str
    ) -> None:
        self.crosscoder, self._running = crosscoder, running
        reading = [edit for edit in edits if edit.reads_code]
        numbers = {number for edit in reading for group in _groups(crosscoder, edit.latents) for number in group}
        reads = [key for number in sorted(numbers) for key in crosscoder.wiring.groups[number].reads]
        self._needed = {source.key: source for source in _underlying(crosscoder, reads)} if reads else {}
        self.rule: Rule = code_rule(crosscoder, edits, running)
        self._beside = {
            alias: (models[alias], [source.site for source in self._needed.values() if source.model == alias])
            for alias in dict.fromkeys(source.model for source in self._needed.values())
            if alias != running or self.rule == "clean"
        }
        self._caches: dict[str, Any] = {}
        self._seen: dict[str, Tensor] = {}

    @property
    def running_keys(self) -> frozenset[str]:
        """The sources that are read from the running activations."""
        own = (key for key, source in self._needed.items() if source.model == self._running)
        return frozenset(own) if self.rule == "running" else frozenset()

    def begin(self, forward: Forward) -> None:
        """Run the others, and the model itself where the rule says so, on the tokens of a forward pass."""
        self._seen = {}
        if forward.num_cached == 0:
            self._caches = {alias: model.new_cache() for alias, (model, _) in self._beside.items() if forward.cached}
        for alias, (model, sites) in self._beside.items():
            cache = self._caches.get(alias) if forward.cached else None
            _check_cache(cache, forward)
            ids, mask = forward.input_ids, forward.attention_mask
            found = model.read(sites, ids, attention_mask=mask, past_key_values=cache)
            self._seen |= {f"{alias}/{site}": x for site, x in found.items()}

    def note(self, key: str, x: Float[Tensor, "batch positions _"]) -> None:
        """Keep what the running model has at a source that is read."""
        self._seen[key] = x

    def code(self, where: Bool[Tensor, "batch positions"], latents: Int[Tensor, "some"]) -> Float[Tensor, "rows some"]:
        """`f` of `latents` on the tokens of `where`, from what is known so far; unknown reads count as their mean."""
        crosscoder, mean = self.crosscoder, self.crosscoder.mean
        num_rows = int(where.sum())
        read = {
            key: self._rows(key, where).to(mean) if key in self._seen else _unseen(crosscoder, key, num_rows)
            for key in crosscoder.reads.underlying.keys
        }
        return _columns(crosscoder.encode(crosscoder.reads.derive(read)), latents.to(mean.device))

    def _rows(self, key: str, where: Tensor) -> Tensor:
        x = self._seen[key]
        return x[where.to(x.device)]


def _columns(code: SparseCode, latents: Tensor) -> Float[Tensor, "rows some"]:
    """Some latents of a code, in full; differentiable in the values."""
    place = torch.full((code.num_latents,), -1, device=latents.device)
    place[latents] = torch.arange(len(latents), device=latents.device)
    column = place[code.latents]
    here = column >= 0
    full = code.values.new_zeros(code.num_rows, len(latents))
    return full.index_put((code.row_ids[here], column[here]), code.values[here])


def _unseen(crosscoder: Crosscoder, key: str, num_rows: int) -> Tensor:
    """What stands for a read that is not known: its mean where there is one."""
    if key in crosscoder.sources:
        return crosscoder.mean[crosscoder.sources.slices[key]].expand(num_rows, -1)
    return crosscoder.mean.new_zeros(num_rows, crosscoder.reads.underlying[key].width)


def _check_cache(cache: Any, forward: Forward) -> None:
    held = 0 if cache is None else int(cache.get_seq_length())
    if forward.cached and held != forward.num_cached:
        raise SourceMismatch(
            f"a text is under way: its cache holds {forward.num_cached} tokens, of which edits have seen {held}.",
            hint="Begin the text inside the `with editing(...)` block.",
        )


def _underlying(crosscoder: Crosscoder, keys: Iterable[str]) -> list[Source]:
    """The sources that models have under these."""
    return list(crosscoder.sources.subset(keys).underlying)


def _groups(crosscoder: Crosscoder, latents: Sequence[int], *, writing: str | None = None) -> list[set[int]]:
    """For every group of one of the latents (that writes a source): it, and those that share a TopK's k with it."""
    wiring = crosscoder.wiring
    ids = torch.tensor(latents)
    own = [
        number
        for number, (first, last) in enumerate(wiring.latent_ranges)
        if bool(((ids >= first) & (ids < last)).any()) and (writing is None or writing in wiring.groups[number].writes)
    ]
    budgets = crosscoder.budgets if isinstance(crosscoder.nonlinearity, TopK) else []
    return [{number, *(g for budget in budgets if number in budget.groups for g in budget.groups)} for number in own]


def check_models(crosscoder: Crosscoder, models: Mapping[str, StudiedModel]) -> None:
    """Raises EditError unless all models of the crosscoder's sources are there, and TokenizerMismatch unless alike."""
    wanted = crosscoder.sources.underlying.models
    missing = [alias for alias in wanted if alias not in models]
    if missing:
        raise EditError(
            f"editing through this crosscoder needs {', '.join(wanted)}; {', '.join(missing)} did not come.",
            hint="Give models={alias: StudiedModel} for every one: each runs beside the other.",
        )
    vocabularies = {alias: models[alias].identity["tokenizer"] for alias in wanted}
    if len(set(vocabularies.values())) > 1:
        raise TokenizerMismatch(
            "while one model runs edited, the others have to run on the same tokens; these do not share a tokenizer.",
            details=[f"{alias}  vocabulary {vocabulary}" for alias, vocabulary in vocabularies.items()],
            hint="Edit through a crosscoder of models that share one.",
        )
