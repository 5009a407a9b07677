"""Exemplar vectors: what the studied models hold where a latent is most active, one vector per exemplar.

    v_e = x̃ at the exemplar's peak,    x̃ = (x − μ) c        all sources side by side, in normalised space

No outside model: two exemplars are alike when the studied models hold alike things there. The latent's own direction is
in every one of its exemplars, as far as it describes them; it is not taken out. Rows around the peak are left out: a
latent of two concepts that occur near one another would have both in every mean over a window.

Memory is exemplars × width; for large dictionaries ask about some of the latents (`Entries.take`).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.activations import ActivationSource, Rows
from crosscoder.analysis.exemplars import Entries
from crosscoder.analysis.passes import check_sources
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.progress import Progress, silent

_STRIDE = 2**32  # more than there are positions in a context


@torch.no_grad()
def exemplar_vectors(
    crosscoder: Crosscoder, activations: ActivationSource, entries: Entries, *, progress: Progress = silent
) -> Float[Tensor, "entries width"]:
    """A vector for every exemplar, in one pass without encoding; zero for one whose row does not come again."""
    check_sources(crosscoder, activations)
    place = entries.context * _STRIDE + entries.position
    order = np.argsort(place, kind="stable")
    mean, scale = crosscoder.mean.cpu(), crosscoder.scale_columns(crosscoder.sources).cpu()
    vectors = torch.zeros(len(entries.latent), crosscoder.sources.width)
    done = 0
    for batch in activations.contexts():
        if batch.rows is None:
            raise SourceMismatch(
                "exemplars are found again by where they lie; these activations do not say.",
                hint="Read them from a stream over text, which gives Batch.rows.",
            )
        row, found = _found(batch.rows, place[order])
        vectors[torch.from_numpy(order[found])] = (batch.x[torch.from_numpy(row)].cpu().float() - mean) * scale
        done += batch.x.shape[0]
        progress("reading exemplars", done, None)
    return vectors


def _found(rows: Rows, places: Int[np.ndarray, "entries"]) -> tuple[Int[np.ndarray, "found"], Int[np.ndarray, "found"]]:
    """Rows at which sorted places lie, and which of the places; a row as often as there are exemplars at it."""
    own = rows.context.long().cpu().numpy() * _STRIDE + rows.position.long().cpu().numpy()
    first, last = (np.searchsorted(places, own, side=side) for side in ("left", "right"))
    number = last - first
    row = np.repeat(np.arange(len(own)), number)
    return row, first[row] + np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
