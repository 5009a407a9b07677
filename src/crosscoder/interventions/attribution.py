"""Attribution of a behaviour to latents, by integrated gradients through one model.

With a metric m of the model's logits, raw-space vectors v_j and the values f_j(t) of the clean activations, move

    x(α) = x − (1 − α) Σ_{j,t} f_j(t) v_j         α: 0 → 1, the reconstruction error and all other tokens kept
    effect_j(t) = f_j(t) ⟨v_j, ∫ ∂m/∂x(α) at t dα⟩

so that the effects of all latents and tokens add up to m(x) − m(x(0)) as the number of steps grows (midpoint rule).

    start None        v_j = d_j^s             from no latent active to the activations as they are
    start a           v_j = d_j^s − d_j^a     from a's share of every latent to s's

One step at α = 1 is gradient × activation. Effects in several models, or checkpoints of one, compare by

    share_s = |IE_s| / Σ_s' |IE_s'|           for two: relative indirect effect, |IE_2| / (|IE_1| + |IE_2|)

Sources: Sundararajan et al. 2017 (integrated gradients); Bayazit et al. 2025, "Crosscoding Through Time" (relative
indirect effects, one against all). Deviation: vectors are in raw space, and the start keeps the reconstruction error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoder.capture.contexts import Context
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.vocabularies import require_one_vocabulary
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, EmptySelection, SourceMismatch
from crosscoder.interventions.attributions import Attribution
from crosscoder.interventions.metrics import Metric
from crosscoder.interventions.reading import (
    BLOCK_TOKENS,
    ReadBlock,
    TokenBlock,
    read_block,
    summed_decoders,
    token_blocks,
    written_site,
)
from crosscoder.interventions.selections import AllTokens, SeenTokens, TokenSelection
from crosscoder.interventions.token_groups import response_places
from crosscoder.progress import Progress, silent
from crosscoder.sources import Source

_PAIRS = 2**16
"""Active pairs whose vectors are multiplied at once."""


@dataclass(frozen=True)
class AttributionPath:
    """What is moved, and in how many steps: `start` is None or the source whose share of every latent to start from.

    Only the latents at the tokens that are selected move.
    """

    start: str | None = None
    steps: int = 10
    tokens: TokenSelection = AllTokens()
    block_tokens: int = BLOCK_TOKENS


def integrated_gradients(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    contexts: Sequence[Context],
    *,
    metric: Metric,
    source: str,
    path: AttributionPath = AttributionPath(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> Attribution:
    """The share of every active latent at `source` in a metric of its model, on these contexts.

    `metric` counts contexts by their place in `contexts`. Raises EmptySelection where no token is selected.
    """
    if path.steps < 1:
        raise EditError(f"expected at least one step; got {path.steps}.")
    points = [(step + 0.5) / path.steps for step in range(path.steps)]
    return _attribute(
        crosscoder, models, contexts, metric=metric, source=source, path=path, points=points, progress=progress
    )


def gradient_times_activation(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    contexts: Sequence[Context],
    *,
    metric: Metric,
    source: str,
    path: AttributionPath = AttributionPath(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> Attribution:
    """The first-order estimate: the gradient at the activations as they are, for one forward and backward."""
    return _attribute(
        crosscoder, models, contexts, metric=metric, source=source, path=path, points=[1.0], progress=progress
    )


def _attribute(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    contexts: Sequence[Context],
    *,
    metric: Metric,
    source: str,
    path: AttributionPath,
    points: Sequence[float],
    progress: Progress,
) -> Attribution:
    place = written_site(crosscoder, models, source)
    require_one_vocabulary(crosscoder.sources, models)
    directions = _directions(crosscoder, place, path.start)
    blocks = token_blocks(enumerate(contexts), most_tokens=path.block_tokens)
    _check_selected(blocks, path.tokens, len(contexts))
    parts: list[Attribution] = []
    for done, block in enumerate(blocks):
        progress("attributing to latents", done, len(blocks))
        moved = _Moved(place, read_block(crosscoder, models, block), directions, selected(block, path.tokens))
        parts.append(moved.attribution(crosscoder, models[place.model], metric=metric, points=points))
    progress("attributing to latents", len(blocks), len(blocks))
    return Attribution.joined(parts, num_contexts=len(contexts))


def selected(block: TokenBlock, tokens: TokenSelection) -> Bool[Tensor, "contexts positions"]:
    """The kept positions of a block that a selection holds; a reply is what the assistant says, where it says it."""
    position = torch.arange(block.ids.shape[1]).expand_as(block.ids)
    reply = torch.roll(response_places(block), 1, dims=1) - 1
    return tokens.mask(SeenTokens(position, block.roles, reply)) & block.kept


def _directions(crosscoder: Crosscoder, place: Source, start: str | None) -> Float[Tensor, "latents width"]:
    rows = crosscoder.decoder_rows(place.key, "raw").detach()
    if start is None:
        return rows
    other = crosscoder.writes.resolve(start)
    if other.width != place.width or other.key == place.key:
        raise SourceMismatch(
            f"expected to start from another source of {place.key}'s width; got {other.key}.",
            details=crosscoder.writes.describe(),
        )
    return rows - crosscoder.decoder_rows(other.key, "raw").detach()


def _check_selected(blocks: Sequence[TokenBlock], tokens: TokenSelection, num_contexts: int) -> None:
    found = {int(number) for block in blocks for number in block.numbers[selected(block, tokens).any(1)]}
    missing = [number for number in range(num_contexts) if number not in found]
    if missing or not num_contexts:
        raise EmptySelection(
            f"no token is selected in {len(missing)} of {num_contexts} contexts.",
            details=[f"none in context {number}" for number in missing[:3]],
            hint="Select other tokens, or leave these contexts out; tokens that never become rows cannot be selected.",
        )


class _Moved:
    """The path of one block's rows."""

    def __init__(
        self,
        place: Source,
        read: ReadBlock,
        directions: Float[Tensor, "latents width"],
        chosen: Bool[Tensor, "contexts positions"],
    ) -> None:
        self._place, self._read, self._directions = place, read, directions
        self._rows = chosen[read.block.kept].to(directions.device)
        self._taken = summed_decoders(read.code, directions).detach() * self._rows[:, None]

    def attribution(
        self, crosscoder: Crosscoder, model: StudiedModel, *, metric: Metric, points: Sequence[float]
    ) -> Attribution:
        """The effects of this block's latents, and the metric at both ends of the path."""
        x = self._read.x[:, crosscoder.sources.slices[self._place.key]]
        ends = [self._measured(model, metric, rows).detach().double().cpu() for rows in (x, x - self._taken)]
        gradient = torch.zeros_like(x)
        for point in points:
            rows = (x - (1 - point) * self._taken).requires_grad_()
            with torch.enable_grad():
                total = self._measured(model, metric, rows).sum()
            gradient += torch.autograd.grad(total, rows)[0] / len(points)
        return self._collected(gradient, ends)

    def _measured(self, model: StudiedModel, metric: Metric, rows: Tensor) -> Float[Tensor, "contexts"]:
        block = self._read.block
        with model.replace(self._place.site, block.writing(rows)):
            return metric(block.logits(model), block)

    def _collected(self, gradient: Float[Tensor, "rows width"], ends: Sequence[Tensor]) -> Attribution:
        code, block = self._read.code, self._read.block
        pairs = self._rows[code.row_ids].nonzero().squeeze(1)
        row_ids, latents, values = code.row_ids[pairs], code.latents[pairs], code.values[pairs].detach()
        slopes = [
            (self._directions[latent] * gradient[row]).sum(1)
            for latent, row in zip(latents.split(_PAIRS), row_ids.split(_PAIRS), strict=True)
        ]
        context, position = block.kept.nonzero(as_tuple=True)
        at = row_ids.cpu()
        return Attribution(
            source=self._place.key,
            context=block.numbers[context[at]],
            position=position[at],
            latent=latents.cpu(),
            effect=(values * torch.cat(slopes)).double().cpu(),
            numbers=block.numbers,
            metric=ends[0],
            metric_start=ends[1],
        )
