"""Contexts in, rows out: the forward passes of a stream.

Contexts of similar length go through the models together, padded on the right, about `batch_tokens` tokens at a time.
All sites of one model are read in one forward. Padding and dropped tokens never become rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations import Batch, Rows
from crosscoder.capture.contexts import Context
from crosscoder.capture.models import StudiedModel
from crosscoder.errors import NonFiniteActivations, SourceMismatch, UnknownSource
from crosscoder.sources import Source, SourceSet

NumberedContext = tuple[int, Context]


@dataclass(frozen=True)
class Harvest:
    """Reads `sources` from `models` on contexts; rows are packed in `dtype` on the first model's device."""

    models: Mapping[str, StudiedModel]
    sources: SourceSet
    batch_tokens: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where rows are put."""
        return self.models[self.sources.models[0]].device

    def rows(self, contexts: Sequence[NumberedContext]) -> Iterator[Batch]:
        """All rows of `contexts`, one Batch per forward pass, the longest contexts first."""
        for group in self._groups(contexts):
            batch = self._forward(group)
            if len(batch.x) > 0:
                yield batch

    def _groups(self, contexts: Sequence[NumberedContext]) -> Iterator[list[NumberedContext]]:
        """Contexts of similar length, so that padded they hold at most `batch_tokens` tokens (or are one context)."""
        group: list[NumberedContext] = []
        for numbered in sorted(contexts, key=lambda numbered: -len(numbered[1])):
            longest = len(group[0][1]) if group else 0
            if group and longest * (len(group) + 1) > self.batch_tokens:
                yield group
                group = []
            group.append(numbered)
        if group:
            yield group

    def _forward(self, group: Sequence[NumberedContext]) -> Batch:
        lengths = np.array([len(context) for _, context in group])
        shape = len(group), int(lengths.max())
        real = np.arange(shape[1]) < lengths[:, None]
        ids, kept = _padded(group, "ids", real), _padded(group, "kept", real)
        mask = None if real.all() else torch.from_numpy(real).long()
        picked = torch.from_numpy(kept.reshape(-1).nonzero()[0])
        x = torch.empty(len(picked), self.sources.width, dtype=self.dtype, device=self.device)
        for alias in self.sources.models:
            self._read_model(alias, torch.from_numpy(ids).long(), mask, picked, x)
        numbers = np.array([number for number, _ in group])
        context, position = np.divmod(picked.numpy(), shape[1])
        role = _padded(group, "roles", real).reshape(-1)[picked.numpy()]
        columns = (torch.from_numpy(column).to(self.device) for column in (numbers[context], position, role))
        return Batch(x, Rows(*columns))

    def _read_model(self, alias: str, ids: Tensor, mask: Tensor | None, picked: Tensor, x: Tensor) -> None:
        """Writes the columns of one model's sources into `x`."""
        own = [source for source in self.sources if source.model == alias]
        seen = self.models[alias].read([source.site for source in own], ids, attention_mask=mask)
        for source in own:
            activations = seen[source.site].flatten(0, 1)
            columns = x[:, self.sources.slices[source.key]]
            columns.copy_(
                activations if len(picked) == len(activations) else activations[picked.to(activations.device)]
            )
            if not bool(columns.isfinite().all()):
                raise self._non_finite(source)

    def _non_finite(self, source: Source) -> NonFiniteActivations:
        dtype = str(self.models[source.model].dtype).removeprefix("torch.")
        held = str(self.dtype).removeprefix("torch.")
        return NonFiniteActivations(
            f"{source.key} gave NaN or infinity; the model is held in {dtype}, its rows in {held}.",
            hint=f"Set models.{source.model}.dtype to float32, or to bfloat16, whose range is wider than float16's. "
            "If it persists, the weights themselves are damaged. A run that has checkpoints needs a new out=PATH.",
        )


def check_sources(models: Mapping[str, StudiedModel], sources: SourceSet) -> None:
    """Raises unless every source is a site of one of `models`, in its width."""
    for source in sources:
        if source.model not in models:
            raise UnknownSource(
                f"expected a model called {source.model!r}, which {source.key} is a site of.",
                details=[f"there is  {alias}" for alias in models],
                hint="Give the model under that alias, or take the source out.",
            )
        width = models[source.model].width(source.site)
        if width != source.width:
            raise SourceMismatch(
                f"expected {source.key} to be {source.width} wide; the model is {width} wide there.",
                hint=f"Take the source from the model: StudiedModel.source({source.site!r}).",
            )


def storage_dtype(models: Mapping[str, StudiedModel]) -> torch.dtype:
    """The narrowest dtype that holds the activations of all models."""
    return reduce(torch.promote_types, (studied.dtype for studied in models.values()))


def _padded(group: Sequence[NumberedContext], column: str, real: np.ndarray) -> np.ndarray:
    """One column of all contexts, side by side, 0 where there is no token."""
    values = [getattr(context.tokens, column) for _, context in group]
    padded = np.zeros(real.shape, dtype=values[0].dtype)
    padded[real] = np.concatenate(values)
    return padded
