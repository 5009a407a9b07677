"""Contexts in, rows out: the forward passes of a stream.

Contexts of similar length go through the models together (see `padding`), about `batch_tokens` tokens at a time. All
sites of one model are read in one forward. Padding and dropped tokens never become rows, and a causal model is not
told of padding: no token sees what comes after it, and attention without a mask is faster. Nothing here makes the CPU
wait for a GPU but `finish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoder.activations import Batch, Rows
from crosscoder.capture.carrying import Carrier
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.padding import NumberedContext, Padded, padded_batches
from crosscoder.errors import NonFiniteActivations, SourceMismatch, UnknownSource
from crosscoder.sources import Source, SourceSet

Finite = Mapping[str, Bool[Tensor, ""]]
"""By source, whether all values of a forward pass are finite; on the device of its model, which nobody waits for."""
CPU_TOKENS = 1024
"""Tokens of a forward pass on the CPU, where more leave the cache: with 4,096 the demo pair is a third slower."""


@dataclass(frozen=True)
class Harvest:
    """Reads `sources` from `models` on contexts; rows are packed in `dtype` on the first model's device.

    `readings` names, by model, the tokenization that it reads where that is not the text's own.
    """

    models: Mapping[str, StudiedModel]
    sources: SourceSet
    batch_tokens: int
    dtype: torch.dtype
    readings: Mapping[str, str] = field(default_factory=dict[str, str])
    _carrier: Carrier = field(default_factory=Carrier)

    @property
    def device(self) -> torch.device:
        """Where rows are put."""
        return self.models[self.sources.models[0]].device

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward pass: `batch_tokens`, or fewer where models run on the CPU."""
        on_cpu = all(model.device.type == "cpu" for model in self.models.values())
        return min(self.batch_tokens, CPU_TOKENS) if on_cpu else self.batch_tokens

    def rows(self, contexts: Sequence[NumberedContext]) -> Iterator[Batch]:
        """All rows of `contexts`, one Batch per forward pass, the longest contexts first."""
        for batch in padded_batches(contexts, most_tokens=self.forward_tokens):
            x = torch.empty(batch.num_rows, self.sources.width, dtype=self.dtype, device=self.device)
            finite = self.read(batch, x)
            self.finish([finite])
            columns = (batch.rows.context, batch.rows.position, batch.rows.role)
            yield Batch(x, Rows(*(column.to(self.device) for column in columns)))

    def read(self, batch: Padded, x: Float[Tensor, "rows width"]) -> Finite:
        """Writes the rows of a forward pass into `x`, and gives which sources are finite there.

        On a GPU both are still under way; `finish` comes before either is used.
        """
        finite: dict[str, Tensor] = {}
        for alias in self.sources.models:
            own = [source for source in self.sources if source.model == alias]
            told = batch.readings[self.readings[alias]] if alias in self.readings else batch
            mask = None if self.models[alias].is_causal else told.mask
            seen = self.models[alias].read([source.site for source in own], told.ids, attention_mask=mask)
            for source in own:
                activations = _picked(seen[source.site].flatten(0, 1), told.picked)
                finite[source.key] = _all_finite(activations)
                self._carrier.carry(activations, x[:, self.sources.slices[source.key]])
        return finite

    def finish(self, finite: Sequence[Finite]) -> None:
        """Has rows that were read ready for use; raises NonFiniteActivations where one of them is not a number."""
        self._carrier.finish()
        for source in self.sources if finite else ():
            if not bool(torch.stack([of[source.key] for of in finite]).all()):
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


def _picked(activations: Tensor, picked: Tensor | None) -> Tensor:
    if picked is None:
        return activations
    return activations[picked.to(activations.device, non_blocking=picked.is_pinned())]


def _all_finite(activations: Tensor) -> Bool[Tensor, ""]:
    """Whether every value is finite: `x − x` is 0 where it is, and NaN elsewhere."""
    return (activations - activations).sum().isfinite()
