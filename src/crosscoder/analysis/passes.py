"""One pass over activations that serves everyone who wants to see the codes, or what they give back.

An observer gets every batch with its code, or with its reconstruction too; what it keeps is bounded and its own. Rows
arrive in the order of the text, and are encoded and decoded once, however many look on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from crosscoder.activations import ActivationSource, Batch
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.progress import Progress, silent
from crosscoder.training.validation import Reconstruction, ReconstructionStatistics, Reconstructor, evaluating


class Observer(Protocol):
    """Anything that watches a pass."""

    def update(self, batch: Batch, code: SparseCode) -> None:
        """See the rows of one batch, packed over the activations' sources, and their code."""
        ...


class ReconstructionObserver(Protocol):
    """Anything that watches a pass and wants the reconstruction too."""

    def update(self, batch: Batch, found: Reconstruction) -> None:
        """See the rows of one batch, and their code, reconstruction and error in normalised space."""
        ...


def watch(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    observers: Sequence[Observer] = (),
    *,
    reconstructions: Sequence[ReconstructionObserver] = (),
    num_rows: int | None = None,
    progress: Progress = silent,
) -> ReconstructionStatistics:
    """Encode and decode all of `activations.contexts()` in eval mode, for the observers and the returned statistics.

    `reconstructions` are observers that get reconstructions as well; `num_rows` is only what progress is shown against.
    """
    check_sources(crosscoder, activations)
    statistics = ReconstructionStatistics(crosscoder)
    with evaluating(crosscoder):
        for batch in activations.contexts():
            found = statistics.update(batch.x.to(crosscoder.mean.device))
            for observer in observers:
                observer.update(batch, found.code)
            for observer in reconstructions:
                observer.update(batch, found)
            progress("reading activations", statistics.num_rows, num_rows)
    _check_rows(statistics.num_rows)
    return statistics


def watch_reconstructions(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    observers: Sequence[ReconstructionObserver],
) -> None:
    """The same pass for observers of reconstructions alone, without the statistics of `watch`."""
    check_sources(crosscoder, activations)
    reconstruct, num_rows = Reconstructor(crosscoder), 0
    with evaluating(crosscoder):
        for batch in activations.contexts():
            found = reconstruct(batch.x.to(crosscoder.mean.device))
            for observer in observers:
                observer.update(batch, found)
            num_rows += found.code.num_rows
    _check_rows(num_rows)


def check_sources(crosscoder: Crosscoder, activations: ActivationSource) -> None:
    """Raises SourceMismatch unless rows of `activations` are packed as the crosscoder's sources are."""
    if activations.sources != crosscoder.sources:
        raise SourceMismatch(
            "these activations are not of the crosscoder's sources, in its order.",
            details=[
                *(f"crosscoder   {line}" for line in crosscoder.sources.describe()),
                *(f"activations  {line}" for line in activations.sources.describe()),
            ],
            hint="Open the activations with sources=crosscoder.sources.",
        )


def _check_rows(num_rows: int) -> None:
    if num_rows == 0:
        raise TextError(
            "expected activations to evaluate on; not one row came.",
            hint="Give a larger held-out set: text.held_out in the run file.",
        )
