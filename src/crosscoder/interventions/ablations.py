"""Ablating one latent at a time in one model: what the change of its predictions adds up to, latent by latent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context
from crosscoder.capture.models import StudiedModel
from crosscoder.interventions.firings import Firings
from crosscoder.interventions.reading import TokenBlock, log_probabilities, positions_at_once

ACTIVE, AFTER = 0, 1
"""Columns of sums: positions on which the latent is active, and others behind one."""


@dataclass(frozen=True)
class Job:
    """One latent in one context: its active rows, and the context up to where the latent's effect is followed.

    `following[p]` is the token after position p, −1 where there is none.
    """

    firings: Firings
    context: Context
    following: Int[Tensor, "positions"]

    @property
    def place(self) -> int:
        """Which of the latents."""
        return int(self.firings.place[0])


@dataclass(frozen=True)
class Change:
    """What became of the predictions at some positions, in fp64 on the CPU; `ce` is NaN where no token follows."""

    kl: Float[Tensor, "positions"]
    ce: Float[Tensor, "positions"]
    probability: Float[Tensor, "positions vocabulary"]


class Sums:
    """Sums over positions, by latent: of KL and of the change of cross-entropy, their numbers, and of probabilities.

    Columns are `ACTIVE` and `AFTER`; `probability` is of active positions alone. fp64, on the CPU.
    """

    def __init__(self, num_latents: int, vocabulary: int) -> None:
        self.kl, self.num_kl, self.ce_change, self.num_ce = torch.zeros(4, num_latents, 2, dtype=torch.float64)
        self.probability = torch.zeros(num_latents, vocabulary, dtype=torch.float64)

    def add(self, latents: Int[Tensor, "some"], kind: Int[Tensor, "some"], change: Change) -> None:
        """What changed at some positions, each of one of the latents, and of a kind."""
        at, known = (latents, kind), change.ce.isfinite()
        self.kl.index_put_(at, change.kl, accumulate=True)
        self.num_kl.index_put_(at, torch.ones_like(change.kl), accumulate=True)
        self.ce_change.index_put_(at, change.ce.nan_to_num(0), accumulate=True)
        self.num_ce.index_put_(at, known.double(), accumulate=True)
        active = kind == ACTIVE
        self.probability.index_add_(0, latents[active], change.probability[active])


def jobs(firings: Firings, text: AnalysisSet, *, window: int) -> list[Job]:
    """One for each latent and context; a context ends `window` positions after the last active row."""
    found: list[Job] = []
    for own in firings.by_context():
        context = text.context(int(own.context[0]))
        ids = torch.from_numpy(context.tokens.ids).long()
        stop = min(len(context), int(own.position.max()) + 1 + window)
        following = torch.cat([ids[1:], torch.tensor([-1])])[:stop]
        found.append(Job(own, Context(context.tokens.window(0, stop), context.documents), following))
    return found


def ablate_each(
    model: StudiedModel,
    site: str,
    block: Sequence[Job],
    *,
    directions: Float[Tensor, "latents width"],
    window: int,
    sums: Sums,
) -> None:
    """One clean forward and one with every job's latent taken away; adds what changed to `sums`."""
    tokens = TokenBlock.of([(number, job.context) for number, job in enumerate(block)])
    taken, active = _taken(block, tokens, directions)
    clean = tokens.logits(model)
    with model.replace(site, lambda x, _: _without(x, taken)):
        ablated = tokens.logits(model)
    following = torch.nn.utils.rnn.pad_sequence([job.following for job in block], batch_first=True, padding_value=-1)
    latent = torch.tensor([job.place for job in block])
    after = _after(active, window) & tokens.real
    for chunk in (active | after).nonzero().split(positions_at_once(clean)):
        row, position = chunk.unbind(1)
        at = row.to(clean.device), position.to(clean.device)
        change = _change(clean[at], ablated[at], following[row, position].to(clean.device))
        sums.add(latent[row], torch.where(after[row, position], AFTER, ACTIVE), change)


def _without(x: Tensor, taken: Tensor) -> Tensor:
    """`x − taken` in the wider dtype of both, rounded once: to take nothing away leaves `x` as it is."""
    wide = torch.promote_types(x.dtype, taken.dtype)
    return (x.to(wide) - taken.to(x.device, wide)).to(x.dtype)


def batched(all_jobs: Sequence[Job], *, most_tokens: int) -> Iterator[list[Job]]:
    """All jobs, the longest first, at most `most_tokens` to a block when padded, or one."""
    part: list[Job] = []
    for job in sorted(all_jobs, key=lambda job: -len(job.context)):
        if part and len(part[0].context) * (len(part) + 1) > most_tokens:
            yield part
            part = []
        part.append(job)
    if part:
        yield part


def _taken(
    block: Sequence[Job], tokens: TokenBlock, directions: Float[Tensor, "latents width"]
) -> tuple[Float[Tensor, "contexts positions width"], Bool[Tensor, "contexts positions"]]:
    """`f_j d_j` at every active position and 0 elsewhere, and which positions are active."""
    taken = directions.new_zeros(*tokens.ids.shape, directions.shape[1])
    active = torch.zeros_like(tokens.real)
    for number, job in enumerate(block):
        position = job.firings.position
        value = job.firings.value.to(directions)
        taken[number, position.to(taken.device)] = value[:, None] * directions[job.place]
        active[number, position] = True
    return taken, active


def _after(active: Bool[Tensor, "contexts positions"], window: int) -> Bool[Tensor, "contexts positions"]:
    """Positions up to `window` behind an active one that are not active themselves."""
    position = torch.arange(active.shape[1]).expand_as(active)
    last = torch.where(active, position, -window - 1).cummax(1).values
    return ~active & (position - last <= window)


def _change(clean: Tensor, ablated: Tensor, following: Int[Tensor, "positions"]) -> Change:
    p, q = log_probabilities(clean), log_probabilities(ablated)
    target = following.clamp(min=0)[:, None]
    found = (
        kl_div(q, p, reduction="none", log_target=True).sum(1),
        torch.where(following >= 0, (p - q).gather(1, target).squeeze(1), torch.nan),
        q.exp() - p.exp(),
    )
    return Change(*(part.double().cpu() for part in found))
