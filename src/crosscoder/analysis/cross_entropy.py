"""Cross-entropy recovered: how much of a model's next-token prediction survives the reconstruction.

With one source at a time replaced in the running model, and CE the mean over next tokens,

    ce_recovered[s] = (CE_ablated − CE_spliced) / (CE_ablated − CE_clean)

spliced: `x_s := x̂_s`, encoded from the clean activations of all sources that are read, at the same tokens;
ablated: `x_s := 0`, or the mean of that source's training rows. Every position is replaced that would become a row; the
others (bos, whatever the run drops) keep their clean activation under splicing and ablation alike, since no crosscoder
was trained on them. All next tokens of a context count, also those predicted from a position that was kept clean.

A model with another tokenizer than the text's reads the text in its own tokens, and predicts those. Replaced are the
positions that are aligned, which are the rows; the tokens in between keep their clean activation. Recovery is then of
what the aligned positions carry: compare it between dictionaries of one run, and not between its models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.progress import Progress, silent
from crosscoder.sources import Source

_CHUNK = 256
"""Positions whose logits are turned into losses at once: bounds the memory beside the logits themselves."""


@dataclass(frozen=True)
class CrossEntropy:
    """Mean next-token cross-entropy (nats) with one source clean, spliced, zeroed and set to its mean."""

    clean: float
    spliced: float
    zero_ablated: float
    mean_ablated: float
    num_tokens: int

    @property
    def recovered(self) -> float:
        """Against zero ablation; NaN where ablation changes nothing."""
        return _recovered(self.zero_ablated, spliced=self.spliced, clean=self.clean)

    @property
    def recovered_mean(self) -> float:
        """Against mean ablation; NaN where ablation changes nothing."""
        return _recovered(self.mean_ablated, spliced=self.spliced, clean=self.clean)


@dataclass(frozen=True)
class TokenBatch:
    """Some contexts side by side, padded on the right: ids, which are tokens, and which positions become rows.

    `others` are the same contexts and rows in other tokenizations, by the alias of the models that read those.
    """

    ids: Int[Tensor, "contexts positions"]
    mask: Int[Tensor, "contexts positions"]
    kept: Bool[Tensor, "contexts positions"]
    others: Mapping[str, TokenBatch] = field(default_factory=dict[str, "TokenBatch"])

    def read_by(self, alias: str) -> TokenBatch:
        """The batch in the tokens of one model."""
        return self.others.get(alias, self)


def cross_entropies(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    num_tokens: int = 20_000,
    batch_tokens: int = 2048,
    progress: Progress = silent,
) -> dict[str, CrossEntropy]:
    """The cross-entropies of every `spliceable` source, over about `num_tokens` tokens of `text`.

    `models` maps the alias of every source's model to it; contexts are a fixed sample of the set.
    """
    _check(crosscoder, models)
    if not spliceable(crosscoder):
        return {}
    aligner = aligner_of(crosscoder, models, text)
    batches = token_batches(text, num_tokens=num_tokens, batch_tokens=batch_tokens, aligner=aligner)
    sums = {source.key: torch.zeros(4, dtype=torch.float64) for source in spliceable(crosscoder)}
    counts = dict.fromkeys(sums, 0)
    for done, batch in enumerate(batches):
        progress("splicing into the models", done, len(batches))
        for key, losses in _losses(crosscoder, models, batch).items():
            sums[key] += torch.tensor(losses, dtype=torch.float64)
            counts[key] += int(batch.read_by(crosscoder.writes[key].model).mask[:, 1:].sum())
    progress("splicing into the models", len(batches), len(batches))
    return {key: CrossEntropy(*(sums[key] / count).tolist(), num_tokens=count) for key, count in counts.items()}


def aligner_of(crosscoder: Crosscoder, models: Mapping[str, StudiedModel], text: AnalysisSet) -> Aligner | None:
    """What gives contexts of `text` their tokens in models with other tokenizers; None where all have the text's."""
    if text.alignment == "identical":
        return None
    aliases = crosscoder.sources.underlying.models
    return Aligner.of({alias: models[alias] for alias in aliases}, vocabulary=text.vocabulary)


def token_batches(
    text: AnalysisSet, *, num_tokens: int, batch_tokens: int, aligner: Aligner | None = None
) -> list[TokenBatch]:
    """A fixed random sample of contexts with about `num_tokens` tokens, sorted by length, `batch_tokens` to a batch.

    With an `aligner`, in the tokens of all models.
    """
    lengths = text.pointers.diff()
    order = torch.randperm(text.num_contexts, generator=torch.Generator().manual_seed(0))
    order = order[lengths[order] > 1]
    if not len(order):
        raise TextError("expected contexts of at least two tokens for cross-entropy; there is none.")
    enough = int((lengths[order].cumsum(0) < num_tokens).sum()) + 1
    chosen = order[:enough]
    chosen = chosen[lengths[chosen].argsort(stable=True)].tolist()
    parts = _fitting(chosen, lengths.tolist(), batch_tokens)
    if aligner is None:
        return [_token_batch(text, part) for part in parts]
    return [_aligned_batch([aligner(text.context(number)) for number in part], aligner) for part in parts]


def _recovered(ablated: float, *, spliced: float, clean: float) -> float:
    return math.nan if ablated == clean else (ablated - spliced) / (ablated - clean)


def _fitting(contexts: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Stretches of contexts (ascending in length) that fit into `batch_tokens` when padded; at least one each."""
    part: list[int] = []
    for context in contexts:
        if part and lengths[context] * (len(part) + 1) > batch_tokens:
            yield part
            part = []
        part.append(context)
    yield part


def _token_batch(text: AnalysisSet, contexts: Sequence[int]) -> TokenBatch:
    parts = [slice(*text.pointers[c : c + 2].tolist()) for c in contexts]
    pad = torch.nn.utils.rnn.pad_sequence
    return TokenBatch(
        ids=pad([text.token_ids[p].long() for p in parts], batch_first=True),
        mask=pad([torch.ones(p.stop - p.start, dtype=torch.int64) for p in parts], batch_first=True),
        kept=pad([text.kept[p] for p in parts], batch_first=True),
    )


def _aligned_batch(contexts: Sequence[Context], aligner: Aligner) -> TokenBatch:
    """Contexts in all tokenizations; the kept positions of each, in order, are the same rows."""
    own = _padded([(context.tokens.ids, context.tokens.kept.nonzero()[0]) for context in contexts])
    others: dict[str, TokenBatch] = {}
    for key, reader in aligner.readers.items():
        readings = [(context.readings[key], context.tokens.kept) for context in contexts]
        found = _padded([(reading.ids, reading.places[kept]) for reading, kept in readings])
        others |= dict.fromkeys(reader.aliases, found)
    return replace(own, others=others)


def _padded(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenBatch:
    """Token ids and the positions that become rows, context by context."""
    ids = torch.zeros(len(rows), max(len(tokens) for tokens, _ in rows), dtype=torch.int64)
    mask, kept = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, places) in enumerate(rows):
        ids[row, : len(tokens)] = torch.from_numpy(tokens).long()
        mask[row, : len(tokens)] = 1
        kept[row, torch.from_numpy(places).long()] = True
    return TokenBatch(ids, mask, kept)


@torch.no_grad()
def _losses(crosscoder: Crosscoder, models: Mapping[str, StudiedModel], batch: TokenBatch) -> dict[str, list[float]]:
    """Summed losses of one batch by written source: clean, spliced, zero, mean."""
    reconstruction = crosscoder.writes.unpack(_reconstruct(crosscoder, models, batch))
    spliced = spliceable(crosscoder)
    clean = {source.model: _summed_loss(models[source.model], batch.read_by(source.model)) for source in spliced}
    losses: dict[str, list[float]] = {}
    for source in spliced:
        mean = crosscoder.mean[crosscoder.sources.slices[source.key]]
        rows = [reconstruction[source.key], torch.zeros_like(mean), mean]
        model = models[source.model]
        own = batch.read_by(source.model)
        replaced = [_summed_loss(model, own, site=source.site, row=row) for row in rows]
        losses[source.key] = [clean[source.model], *replaced]
    return losses


def _reconstruct(
    crosscoder: Crosscoder, models: Mapping[str, StudiedModel], batch: TokenBatch
) -> Float[Tensor, "rows writes"]:
    """`x̂` of the rows that are kept, from the clean activations of every source that is read."""
    device = crosscoder.mean.device
    read: dict[str, Tensor] = {}
    harvested = crosscoder.reads.underlying
    for alias in harvested.models:
        sites = [source.site for source in harvested if source.model == alias]
        own = batch.read_by(alias)
        found = models[alias].read(sites, own.ids, attention_mask=own.mask)
        read |= {f"{alias}/{site}": x[own.kept.to(x.device)].to(crosscoder.mean) for site, x in found.items()}
    return crosscoder(crosscoder.reads.derive(read).to(device))


def _summed_loss(
    model: StudiedModel, batch: TokenBatch, *, site: str | None = None, row: Tensor | None = None
) -> float:
    """The loss of all next tokens, with the kept positions of `site` set to `row` (one for each, or one for all)."""
    change: Any = nullcontext()
    if site is not None and row is not None:
        change = model.replace(site, _writer(row, batch.kept))
    with change:
        logits = model.logits(batch.ids, attention_mask=batch.mask)
    total = 0.0
    for chunk in batch.mask[:, 1:].nonzero().split(_CHUNK):
        context, position = chunk.unbind(1)
        target = batch.ids[context, position + 1].to(logits.device)
        predicted = logits[context.to(logits.device), position.to(logits.device)].float()
        total += float(torch.nn.functional.cross_entropy(predicted, target, reduction="sum"))
    return total


def _writer(row: Tensor, kept: Bool[Tensor, "contexts positions"]) -> Callable[[Tensor, Tensor], Tensor]:
    def write(x: Tensor, position_ids: Tensor) -> Tensor:
        new = x.clone()
        new[kept.to(x.device)] = row.to(x.device, x.dtype)
        return new

    return write


def spliceable(crosscoder: Crosscoder) -> list[Source]:
    """The sources that can be replaced one at a time: those that a model has.

    Where one is written and not read, all reads are clean still: what precedes it is. All at once: `replacement.py`.
    """
    return [source for source in crosscoder.writes if source.difference is None]


def _check(crosscoder: Crosscoder, models: Mapping[str, StudiedModel]) -> None:
    wanted = crosscoder.sources.underlying.models
    missing = [alias for alias in wanted if alias not in models]
    if missing:
        raise SourceMismatch(
            f"cross-entropy needs {', '.join(wanted)}; {', '.join(missing)} did not come.",
            hint="Give models={alias: StudiedModel} for every one, or none to leave cross-entropy out.",
        )
