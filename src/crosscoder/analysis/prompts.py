"""The code of one's own prompts: which latents are active on which token.

Values `f` of two latents are on different scales, as their decoders have different norms. So latents are ranked by
their score `f_i Σ_s ‖d_i^s‖` (normalised space), the length that they add to the reconstruction at all sources. A whole
prompt has three rankings: by the largest score, by the sum of scores over its tokens, and by the largest value relative
to the latent's own mean where it is active on the analysis set, which brings up what is unusual for that latent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.activations import Rows
from crosscoder.analysis.labelled_rows import joined, select_rows
from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.analysis.passes import check_sources
from crosscoder.analysis.prompt_text import Prompt, PromptText, Rendering, prompt_text
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.derived import derived
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.recorded import check_recorded
from crosscoder.capture.stream import ActivationStream
from crosscoder.capture.text import Drop
from crosscoder.codes import SparseCode, pointers
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError
from crosscoder.progress import Progress, silent
from crosscoder.training.validation import evaluating

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptLatents:
    """What each latent does in each prompt in which it is active; entries by prompt, then latent.

    `maximum` and `total` are of its values, `peak` is the row of the largest, `num_tokens` counts the active ones.
    """

    prompt: Int[Tensor, "entries"]
    latent: Int[Tensor, "entries"]
    maximum: Float[Tensor, "entries"]
    total: Float[Tensor, "entries"]
    num_tokens: Int[Tensor, "entries"]
    peak: Int[Tensor, "entries"]


@dataclass(frozen=True)
class PromptValues:
    """One number for every prompt and latent: the largest value in the prompt, and the mean over its rows.

    Both are codes whose rows are prompts; `num_rows` is the number of tokens that each prompt's mean is over.
    """

    maximum: SparseCode
    mean: SparseCode
    num_rows: Int[Tensor, "prompts"]

    def of(self, prompts: Bool[Tensor, "prompts"]) -> PromptValues:
        """Those of some prompts."""
        chosen = prompts.numpy()
        return PromptValues(select_rows(self.maximum, chosen), select_rows(self.mean, chosen), self.num_rows[prompts])


@dataclass(frozen=True)
class PromptCode:
    """Prompts and their code: row r is the token at `rows.position[r]` of prompt `rows.context[r]`."""

    text: PromptText
    code: SparseCode
    rows: Rows

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return self.text.num_prompts

    @cached_property
    def row_of_token(self) -> Int[Tensor, "tokens"]:
        """The row of every token of `text`, −1 where it was dropped."""
        place = self.text.contexts.pointers[self.rows.context] + self.rows.position
        rows = torch.full((self.text.contexts.num_tokens,), -1)
        return rows.index_copy(0, place, torch.arange(len(place)))

    @cached_property
    def token_of_row(self) -> Int[Tensor, "rows"]:
        """The token of `text` that every row is of."""
        return self.text.contexts.pointers[self.rows.context] + self.rows.position

    def values_of(self, latent: int) -> Float[Tensor, "rows"]:
        """One latent's value in every row."""
        mine = self.code.latents == latent
        return torch.zeros(self.code.num_rows).index_copy(0, self.code.row_ids[mine], self.code.values[mine].float())

    @cached_property
    def by_prompt(self) -> PromptLatents:
        """Maximum, sum and peak of every latent in every prompt."""
        code = self.code
        key = self.rows.context[code.row_ids] * code.num_latents + code.latents
        order = torch.argsort(code.values, descending=True, stable=True)
        order = order[torch.argsort(key[order], stable=True)]  # by prompt and latent, the largest value first
        keys, counts = key[order].unique_consecutive(return_counts=True)
        first = order[counts.cumsum(0) - counts]
        place = torch.arange(len(keys)).repeat_interleave(counts)
        total = torch.zeros(len(keys), dtype=torch.float64).index_add(0, place, code.values[order].double())
        return PromptLatents(
            prompt=keys // code.num_latents,
            latent=keys % code.num_latents,
            maximum=code.values[first].double(),
            total=total,
            num_tokens=counts,
            peak=code.row_ids[first],
        )

    def per_prompt(self) -> PromptValues:
        """Maximum and mean of every latent in every prompt."""
        found = self.by_prompt
        num_rows = torch.bincount(self.rows.context, minlength=self.num_prompts)
        starts = pointers(found.prompt, num_rows=self.num_prompts)
        mean = found.total / num_rows[found.prompt]
        return PromptValues(
            maximum=SparseCode(starts, found.latent, found.maximum, self.code.num_latents),
            mean=SparseCode(starts, found.latent, mean, self.code.num_latents),
            num_rows=num_rows,
        )


@torch.no_grad()
def encode_text(
    crosscoder: Crosscoder, models: Mapping[str, StudiedModel], text: PromptText, *, progress: Progress = silent
) -> PromptCode:
    """The code of prompts that are tokens already, in eval mode; `models` by the alias of the crosscoder's sources."""
    stream = ActivationStream(models, crosscoder.sources.underlying, text.contexts)
    activations = derived(stream, crosscoder.sources)
    check_sources(crosscoder, activations)
    reads = list(crosscoder.sources.columns(crosscoder.reads.keys))
    codes, rows, done = list[SparseCode](), list[Rows](), 0
    with evaluating(crosscoder):
        for batch in activations.contexts():
            assert batch.rows is not None, "a stream over contexts says where its rows lie"
            codes.append(crosscoder.encode(batch.x[:, reads].to(crosscoder.mean)))
            rows.append(batch.rows)
            done += len(batch.x)
            progress("encoding prompts", done, int(text.contexts.kept.sum()))
    columns = (torch.cat([getattr(r, name).cpu() for r in rows]) for name in ("context", "position", "role"))
    return PromptCode(text, joined(codes), Rows(*columns))


def encode_prompts(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    rendering: Rendering | None = None,
    drop: Sequence[Drop] = ("bos", "pad"),
    progress: Progress = silent,
) -> PromptCode:
    """The active latents of `prompts` (text, or messages), token by token.

    `tokenizer` renders them (the first model's where none is given), as `chat` where it has a chat template. `drop`
    should be what the run dropped. Models with other tokenizers are read where tokens of all end at the same byte.

    Raises TextError for prompts that cannot be read, ModelMismatch for models that are not those which the crosscoder
    was trained on.
    """
    used = {alias: models[alias] for alias in crosscoder.sources.underlying.models if alias in models}
    check_recorded(used, crosscoder.provenance)
    tokenizer = tokenizer or next(iter(models.values())).tokenizer
    aligner = Aligner.of(used, vocabulary=vocabulary_hash(tokenizer))
    most = _most_tokens(models)
    text = prompt_text(prompts, tokenizer, rendering=rendering, drop=drop, max_tokens=most, aligner=aligner)
    return encode_text(crosscoder, models, text, progress=progress)


def encode_for_run(
    run: OpenedRun, prompts: Sequence[Prompt], *, rendering: Rendering | None = None, name: str = "the prompts"
) -> PromptCode:
    """The same for an opened run, with its models, tokenizer and dropped tokens; `name` is the prompts' in errors.

    Raises ConfigError for a null pair too, one of whose sources no model has.
    """
    if run.config.activations.null_pair is not None:
        raise ConfigError(
            "prompts have no code in a null pair: the activations of one of its sources are made up, not a model's.",
            hint="Encode them in the run that it is the control of.",
        )
    check_recorded(run.models, run.crosscoder.provenance)
    text = prompt_text(
        prompts,
        run.tokenizer,
        rendering=rendering,
        drop=run.config.text.drop,
        max_tokens=_most_tokens(run.models),
        aligner=Aligner.of(run.models, vocabulary=vocabulary_hash(run.tokenizer)),
        name=name,
    )
    longest, trained = text.contexts.context_length, run.config.text.context_length
    if longest > trained:
        _log.warning("the longest prompt has %d tokens; in training no context had more than %d.", longest, trained)
    return encode_text(run.crosscoder, run.models, text, progress=run.progress)


def _most_tokens(models: Mapping[str, StudiedModel]) -> int | None:
    return min((m.max_positions for m in models.values() if m.max_positions is not None), default=None)
