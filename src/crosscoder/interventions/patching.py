"""KL patching: how much of what b predicts comes back when chosen latents' difference is added to a's activations.

With raw-space decoder vectors `d_j` and the values `f_j` of the clean activations, for a set of latents S

    h_S = x_a + Σ_{j ∈ S} f_j (d_j^b − d_j^a)

takes the place of b's activation at the site, b's remaining layers run on it, and KL(p_b ‖ p_S) is taken at every
token.

    none            h = x_a                              the whole gap
    offset          x_a + o                              o: by which reconstructions differ beside latents (means)
    latents         S: all latents
    reconstruction  x_a + x̂_b − x̂_a                     all latents and the offset
    error           x_a + (x_b − x̂_b) − (x_a − x̂_a)
    everything      reconstruction and error together    b's own activation: a check of the arithmetic, and its noise
    template        x_b at template tokens, x_a elsewhere

Source: Minder et al. 2025, section 3.4. Deviations: vectors and activations are in raw space whatever the normaliser;
tokens that the crosscoder was not trained on (bos) keep b's activation under every condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from crosscoder.activations import ROLES
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.interventions.patching_curves import Condition, PatchingCurves, bootstrap_means
from crosscoder.interventions.reading import (
    BLOCK_TOKENS,
    ReadBlock,
    TokenBlock,
    checked_latents,
    log_probabilities,
    positions_at_once,
    read_block,
    summed_decoders,
    token_blocks,
    written_site,
)
from crosscoder.interventions.token_groups import token_groups
from crosscoder.progress import Progress, silent
from crosscoder.sources import Source

REFERENCES = ("none", "offset", "latents", "reconstruction", "error", "everything")


@dataclass(frozen=True)
class PatchingPlan:
    """How much is run.

    `num_contexts` are drawn from those with responses, where there are any; `sizes` are the numbers of latents on the
    curves (None: 1, 3, 10, 30, ... up to the longest ranking); random sets are drawn `num_random` times from all ranked
    latents; of every ranking the first `num_chosen` latents (None: 4 % of the dictionary, as in Minder et al.) are
    split into halves. `first` response tokens are a group of their own.
    """

    num_contexts: int = 64
    sizes: tuple[int, ...] | None = None
    num_random: int = 3
    num_chosen: int | None = None
    first: int = 9
    block_tokens: int = BLOCK_TOKENS
    num_draws: int = 1000
    seed: int = 0


@torch.no_grad()
def patching(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    text: AnalysisSet,
    *,
    a: str,
    b: str,
    rankings: Mapping[str, Int[Tensor, "_"]],
    plan: PatchingPlan = PatchingPlan(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> PatchingCurves:
    """The divergences of all conditions, from `a` to `b`, for latents ranked by each of `rankings` (best first).

    Swap a and b for the other direction. Raises SourceMismatch, saying why, where a's activations mean nothing to b:
    another width, another site, one model, another architecture.
    """
    source_a, source_b = patchable_pair(crosscoder, models, a=a, b=b)
    ranked = {name: checked_latents(crosscoder, latents) for name, latents in rankings.items()}
    sets = _latent_sets(ranked, plan, crosscoder.num_latents)
    conditions = (*(Condition("reference", name) for name in REFERENCES), Condition("tokens", "template"), *sets)
    rows_of = crosscoder.decoder_rows(source_b.key, "raw") - crosscoder.decoder_rows(source_a.key, "raw")
    blocks = token_blocks(_sampled(text, plan), most_tokens=plan.block_tokens)
    tally = _Tally(blocks, num_conditions=len(conditions))
    for done, block in enumerate(blocks):
        progress("patching latents' differences", done, len(blocks))
        patched = _Patched(crosscoder, read_block(crosscoder, models, block), (source_a, source_b), rows_of, sets)
        kl = _divergences(models[source_b.model], source_b.site, block, rows=map(patched.rows, conditions), plan=plan)
        tally.add(block, token_groups(block, first=plan.first), kl)
    progress("patching latents' differences", len(blocks), len(blocks))
    return tally.curves((source_a.key, source_b.key), conditions, plan)


def patchable_pair(
    crosscoder: Crosscoder, models: Mapping[str, StudiedModel], *, a: str, b: str
) -> tuple[Source, Source]:
    """The two sources, if a's activations can stand for b's: one site of two models of one kind and one vocabulary."""
    pair = written_site(crosscoder, models, a), written_site(crosscoder, models, b)
    one, two = (models[source.model] for source in pair)
    vocabularies = {vocabulary_hash(models[alias].tokenizer) for alias in crosscoder.sources.underlying.models}
    reasons = {
        "they are of one model": pair[0].model == pair[1].model,
        "they are different sites": pair[0].site != pair[1].site,
        "they differ in width": pair[0].width != pair[1].width,
        "the models are of different architectures": one.architecture.name != two.architecture.name,
        "the models have different numbers of layers": one.num_layers != two.num_layers,
        "the models have different vocabularies": len(vocabularies) > 1,
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise SourceMismatch(
            f"{pair[0].key} cannot be patched into the model of {pair[1].key}: {wrong[0]}.",
            details=[f"{source.key}  width {source.width}" for source in pair],
            hint="Patching needs one site of two models that descend from one another.",
        )
    return pair


def _sampled(text: AnalysisSet, plan: PatchingPlan) -> list[tuple[int, Context]]:
    """A fixed sample of contexts: of those with responses, where there are any."""
    lengths = text.pointers.diff()
    owner = torch.repeat_interleave(torch.arange(text.num_contexts), lengths)
    spoken = torch.bincount(owner[text.roles == ROLES.index("assistant")], minlength=text.num_contexts)
    pool = (spoken > 0 if bool(spoken.any()) else lengths > 1).nonzero().squeeze(1)
    if not len(pool):
        raise TextError("expected contexts of at least two tokens to patch; there is none.")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(plan.seed))
    return [(number, text.context(number)) for number in pool[order[: plan.num_contexts]].tolist()]


def _latent_sets(rankings: Mapping[str, Tensor], plan: PatchingPlan, num_latents: int) -> dict[Condition, Tensor]:
    """The latents of every ranked, random and half set."""
    longest = max((len(latents) for latents in rankings.values()), default=0)
    sizes = plan.sizes or tuple(size for power in range(9) for size in (10**power, 3 * 10**power) if size <= longest)
    sets = {
        Condition("ranked", name, size): latents[:size]
        for name, latents in rankings.items()
        for size in sizes
        if size <= len(latents)
    }
    return sets | _random_sets(rankings, sizes, plan) | _halves(rankings, plan.num_chosen or max(2, num_latents // 25))


def _random_sets(rankings: Mapping[str, Tensor], sizes: Sequence[int], plan: PatchingPlan) -> dict[Condition, Tensor]:
    """Nested, as ranked sets are: of every seed's order of all ranked latents, the first ones."""
    if not rankings:
        return {}
    pool = torch.cat(list(rankings.values())).unique()
    orders = [
        pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(plan.seed + 1 + seed))]
        for seed in range(plan.num_random)
    ]
    return {
        Condition("random", "random", size, seed): order[:size]
        for size in sizes
        if size <= len(pool)
        for seed, order in enumerate(orders)
    }


def _halves(rankings: Mapping[str, Tensor], num_chosen: int) -> dict[Condition, Tensor]:
    found: dict[Condition, Tensor] = {}
    for name, latents in rankings.items():
        half = min(num_chosen, len(latents)) // 2
        if half:
            found[Condition("top half", name, half)] = latents[:half]
            found[Condition("bottom half", name, half)] = latents[half : 2 * half]
    return found


class _Patched:
    """The rows of one block under every condition."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        read: ReadBlock,
        pair: tuple[Source, Source],
        differences: Float[Tensor, "latents width"],
        sets: Mapping[Condition, Tensor],
    ) -> None:
        x, reconstruction = (
            crosscoder.sources.unpack(read.x),
            crosscoder.writes.unpack(crosscoder.decode(read.code, read.reads)),
        )
        key_a, key_b = (source.key for source in pair)
        self._x_a, self._x_b = x[key_a], x[key_b]
        self._difference = reconstruction[key_b] - reconstruction[key_a]
        self._code, self._differences, self._sets = read.code, differences, sets
        self._template = read.block.roles[read.block.kept] == ROLES.index("template")

    def rows(self, condition: Condition) -> Float[Tensor, "rows width"]:
        """What takes the place of b's rows."""
        if condition.kind == "tokens":
            return torch.where(self._template[:, None].to(self._x_a.device), self._x_b, self._x_a)
        if condition.kind != "reference":
            return self._x_a + self._of(self._sets[condition])
        error = (self._x_b - self._x_a) - self._difference
        match condition.name:
            case "none":
                return self._x_a
            case "offset":
                return self._x_a + (self._difference - self._of(None))
            case "latents":
                return self._x_a + self._of(None)
            case "reconstruction":
                return self._x_a + self._difference
            case "error":
                return self._x_a + error
            case _:
                return self._x_a + self._difference + error

    def _of(self, latents: Tensor | None) -> Float[Tensor, "rows width"]:
        """`Σ_j f_j (d_j^b − d_j^a)` over these latents, or over all."""
        chosen = None
        if latents is not None:
            chosen = torch.zeros(len(self._differences), dtype=torch.bool)
            chosen[latents] = True
        return summed_decoders(self._code, self._differences, chosen=chosen)


def _divergences(
    model: StudiedModel, site: str, block: TokenBlock, *, rows: Iterator[Tensor], plan: PatchingPlan
) -> Float[Tensor, "conditions kept"]:
    """KL(clean ‖ patched) at every position that is kept; conditions go through the model together."""
    clean = _kept_log_probabilities(block.logits(model), block)
    together = max(1, plan.block_tokens // block.ids.numel())
    found: list[Tensor] = []
    while batch := list(islice(rows, together)):
        stacked = block.repeated(len(batch))
        with model.replace(site, stacked.writing(torch.cat(batch))):
            logits = stacked.logits(model)
        found += [_divergence(clean, part, block) for part in logits.chunk(len(batch))]
    return torch.stack(found)


def _kept_log_probabilities(logits: Tensor, block: TokenBlock) -> Float[Tensor, "kept vocabulary"]:
    return log_probabilities(logits[block.kept.to(logits.device)])


def _divergence(clean: Tensor, logits: Tensor, block: TokenBlock) -> Float[Tensor, "kept"]:
    """In fp64 on the CPU."""
    patched = logits[block.kept.to(logits.device)]
    size = positions_at_once(clean)
    parts = [
        kl_div(log_probabilities(q), p, reduction="none", log_target=True).sum(1)
        for p, q in zip(clean.split(size), patched.split(size), strict=True)
    ]
    return torch.cat(parts).double().cpu()


class _Tally:
    """Sums of divergences by condition, group and document; a token of no document counts with its context."""

    def __init__(self, blocks: Sequence[TokenBlock], *, num_conditions: int) -> None:
        self._units = torch.cat([_units(block) for block in blocks]).unique()
        self._num_conditions, self._num_contexts = num_conditions, sum(len(block.numbers) for block in blocks)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, block: TokenBlock, groups: Mapping[str, Bool[Tensor, "contexts positions"]], kl: Tensor) -> None:
        """The divergences (conditions, kept positions) of one block."""
        unit = torch.searchsorted(self._units, _units(block))
        for name, positions in groups.items():
            inside = positions[block.kept]
            sums = self._sums.setdefault(name, torch.zeros(self._num_conditions, len(self._units), dtype=kl.dtype))
            sums.index_add_(1, unit[inside], kl[:, inside])
            counts = self._counts.setdefault(name, torch.zeros(len(self._units), dtype=kl.dtype))
            counts += torch.bincount(unit[inside], minlength=len(self._units))

    def curves(self, pair: tuple[str, str], conditions: tuple[Condition, ...], plan: PatchingPlan) -> PatchingCurves:
        """Means and draws, of the groups that have tokens."""
        names = tuple(name for name, counts in self._counts.items() if counts.sum() > 0)
        sums = torch.stack([self._sums[name] for name in names], dim=1)
        counts = torch.stack([self._counts[name] for name in names])
        return PatchingCurves(
            *pair,
            conditions=conditions,
            groups=names,
            kl=sums.sum(2) / counts.sum(1),
            draws=bootstrap_means(sums, counts, num_draws=plan.num_draws, seed=plan.seed),
            num_tokens=counts.sum(1).long(),
            num_documents=len(self._units),
            num_contexts=self._num_contexts,
        )


def _units(block: TokenBlock) -> Int[Tensor, "kept"]:
    """The document of every kept position, or -1 − the context's number."""
    alone = (-1 - block.numbers)[:, None].expand_as(block.documents)
    return torch.where(block.documents < 0, alone, block.documents)[block.kept]
