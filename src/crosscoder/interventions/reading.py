"""Contexts side by side with the rows and codes that a crosscoder makes of them: what every causal check starts from.

Only positions that would become rows can be changed; the others (bos, whatever the run drops) keep the activation that
the model gives them, since no crosscoder was trained on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.capture.contexts import Context, DocumentId, Tokens
from crosscoder.capture.harvest import CPU_TOKENS, check_sources
from crosscoder.capture.models import Replacement, StudiedModel
from crosscoder.capture.text import document_hash
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, SourceMismatch
from crosscoder.interventions.edits import check_latents
from crosscoder.interventions.prompts import Prompt
from crosscoder.sources import Source
from crosscoder.training.validation import evaluating

BLOCK_TOKENS = CPU_TOKENS
"""Tokens of one forward pass, unless the caller says otherwise."""
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class TokenBlock:
    """The contexts of one forward pass, padded on the right; `numbers` tells which they are.

    `real` is true at tokens and false at padding; `kept` where a token becomes a row, in reading order.
    """

    numbers: Int[Tensor, "contexts"]
    ids: Int[Tensor, "contexts positions"]
    real: Bool[Tensor, "contexts positions"]
    kept: Bool[Tensor, "contexts positions"]
    roles: Int[Tensor, "contexts positions"]
    documents: Int[Tensor, "contexts positions"]

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, without padding."""
        return int(self.real.sum())

    @property
    def lengths(self) -> Int[Tensor, "contexts"]:
        """The number of tokens of each context."""
        return self.real.sum(1)

    def repeated(self, times: int) -> TokenBlock:
        """The same contexts several times over, one whole block after the other."""
        columns = (self.ids, self.real, self.kept, self.roles, self.documents)
        return TokenBlock(self.numbers.repeat(times), *(column.repeat(times, 1) for column in columns))

    def mask(self, model: StudiedModel) -> Int[Tensor, "contexts positions"] | None:
        """The attention mask that `model` needs; a causal model sees no padding on the right, so it needs none."""
        return None if bool(self.real.all()) or model.is_causal else self.real.long()

    def logits(self, model: StudiedModel) -> Float[Tensor, "contexts positions vocabulary"]:
        """What `model` predicts; honours `replace`."""
        return model.logits(self.ids, attention_mask=self.mask(model))

    def writing(self, rows: Float[Tensor, "rows width"]) -> Replacement:
        """For `StudiedModel.replace`: these rows at the positions that are kept, the others as they come."""

        def write(x: Tensor, position_ids: Tensor) -> Tensor:
            new = x.clone()
            new[self.kept.to(x.device)] = rows.to(x.device, x.dtype)
            return new

        return write

    @classmethod
    def of(cls, contexts: Sequence[tuple[int, Context]]) -> TokenBlock:
        """These contexts, under their numbers."""
        lengths = np.array([len(context) for _, context in contexts])
        real = np.arange(lengths.max()) < lengths[:, None]
        columns = ("ids", "kept", "roles", "document")
        ids, kept, roles, documents = (_side_by_side(contexts, column, real) for column in columns)
        numbers = torch.tensor([number for number, _ in contexts])
        return cls(numbers, ids.long(), torch.from_numpy(real), kept, roles.long(), documents.long())


@dataclass(frozen=True)
class ReadBlock:
    """A block with the rows of all the crosscoder's sources and of those that it reads, raw and packed; their code."""

    block: TokenBlock
    x: Float[Tensor, "rows width"]
    reads: Float[Tensor, "rows reads"]
    code: SparseCode


def token_blocks(contexts: Iterable[tuple[int, Context]], *, most_tokens: int = BLOCK_TOKENS) -> list[TokenBlock]:
    """All of these contexts, the longest first; padded, a block holds at most `most_tokens` tokens or is one context.

    Contexts that would give no row are left out.
    """
    groups: list[list[tuple[int, Context]]] = []
    for numbered in sorted(contexts, key=lambda numbered: -len(numbered[1])):
        if numbered[1].num_rows == 0:
            continue
        if not groups or len(groups[-1][0][1]) * (len(groups[-1]) + 1) > most_tokens:
            groups.append([])
        groups[-1].append(numbered)
    return [TokenBlock.of(group) for group in groups]


@torch.no_grad()
def read_block(crosscoder: Crosscoder, models: Mapping[str, StudiedModel], block: TokenBlock) -> ReadBlock:
    """One clean forward of every model up to its deepest source, and the code of the rows in eval mode."""
    found: dict[str, Tensor] = {}
    harvested = crosscoder.sources.underlying
    for alias in harvested.models:
        model = models[alias]
        sites = [source.site for source in harvested if source.model == alias]
        seen = model.read(sites, block.ids, attention_mask=block.mask(model))
        found |= {f"{alias}/{site}": x[block.kept.to(x.device)].to(crosscoder.mean) for site, x in seen.items()}
    x = crosscoder.sources.derive(found)
    parts = crosscoder.sources.unpack(x)
    reads = crosscoder.reads.pack({key: parts[key] for key in crosscoder.reads.keys})
    with evaluating(crosscoder):
        return ReadBlock(block, x, reads, crosscoder.encode(reads))


def as_context(prompt: Prompt) -> Context:
    """A prompt as a context, to be measured on as it stands."""
    size = len(prompt)
    document, place = np.zeros(size, np.int32), np.zeros(size, np.int32)
    columns = (prompt.ids.int().numpy(), prompt.roles.to(torch.int8).numpy(), document, place, place)
    return Context(Tokens(*columns, kept=prompt.kept.numpy()), (DocumentId(document_hash(prompt.text), "the prompts"),))


def continued(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """The prompt with more tokens behind it, which the assistant speaks; for the probability of a given reply."""
    more = torch.tensor(tokens, dtype=torch.int64)
    return Prompt(
        ids=torch.cat([prompt.ids, more]),
        roles=torch.cat([prompt.roles, torch.full_like(more, ROLES.index("assistant"))]),
        kept=torch.cat([prompt.kept, torch.ones_like(more, dtype=torch.bool)]),
        text=prompt.text,
    )


def written_site(crosscoder: Crosscoder, models: Mapping[str, StudiedModel], name: str) -> Source:
    """The written source called `name`, as a place in a model that can be replaced.

    Raises UnknownSource where it is none, or a model is missing, and SourceMismatch for a difference of two models,
    which no model has.
    """
    check_sources(models, crosscoder.sources.underlying)
    source = crosscoder.writes.resolve(name)
    if source.difference is not None:
        raise SourceMismatch(
            f"{source.key} is a difference of two models; neither has it, so neither can be given another value there.",
            details=crosscoder.writes.describe(),
            hint="Name a source that a model has.",
        )
    return source


def checked_latents(crosscoder: Crosscoder, latents: Int[Tensor, "some"] | Sequence[int]) -> Int[Tensor, "some"]:
    """These latents as a tensor; raises UnknownLatent where one is out of range, EditError where one comes twice."""
    found = torch.as_tensor(latents, dtype=torch.int64).cpu()
    check_latents(crosscoder, found.tolist())
    if len(found.unique()) < len(found):
        raise EditError("expected every latent once; some come twice.")
    return found


def summed_decoders(
    code: SparseCode, rows: Float[Tensor, "latents width"], *, chosen: Bool[Tensor, "latents"] | None = None
) -> Float[Tensor, "rows width"]:
    """`Σ_j f_j d_j` of every row, over the latents that are chosen; `rows` holds the vectors `d_j`."""
    latents, values, row_ids = code.latents, code.values, code.row_ids
    if chosen is not None:
        inside = chosen.to(latents.device)[latents]
        latents, values, row_ids = latents[inside], values[inside], row_ids[inside]
    starts = torch.searchsorted(row_ids, torch.arange(code.num_rows, device=row_ids.device))
    return torch.nn.functional.embedding_bag(latents, rows, starts, mode="sum", per_sample_weights=values)


def log_probabilities(logits: Float[Tensor, "*positions vocabulary"]) -> Float[Tensor, "*positions vocabulary"]:
    """Log-softmax in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def positions_at_once(logits: Float[Tensor, "*positions vocabulary"]) -> int:
    """How many positions' distributions to compare at a time: bounds the memory beside the logits themselves."""
    return max(1, _CHUNK_LOGITS // logits.shape[-1])


def _side_by_side(contexts: Sequence[tuple[int, Context]], column: str, real: np.ndarray) -> Tensor:
    """One column of all contexts, 0 where there is no token."""
    values = [getattr(context.tokens, column) for _, context in contexts]
    padded = np.zeros(real.shape, dtype=values[0].dtype)
    padded[real] = np.concatenate(values)
    return torch.from_numpy(padded)
