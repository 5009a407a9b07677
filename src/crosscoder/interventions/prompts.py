"""Prompts: rendered, tokenized, and side by side with padding on the left, as generation needs them.

A dialogue is rendered by the tokenizer's chat template with what opens a reply; a string is taken as it is. BOS opens
every prompt where the tokenizer has one. Each token knows who speaks it, and whether its like was a row in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.capture.chat import Rendered, awaiting_reply, render
from crosscoder.capture.contexts import Context, Encoder, Tokens
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.text import Document, Drop
from crosscoder.errors import TextError
from crosscoder.interventions.selections import SeenTokens

Content = str | Sequence[Mapping[str, Any]]
"""A text to go on with, or the messages of a dialogue that awaits a reply."""

_ASSISTANT = ROLES.index("assistant")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, who speaks them, which of them edits may touch, and the text that they are of."""

    ids: Int[Tensor, "positions"]
    roles: Int[Tensor, "positions"]
    kept: Bool[Tensor, "positions"]
    text: str

    @classmethod
    def of(cls, context: Context, text: str = "") -> Prompt:
        """The tokens of a context as a prompt."""
        tokens = context.tokens
        columns = (torch.from_numpy(column.copy()) for column in (tokens.ids, tokens.roles, tokens.kept))
        ids, roles, kept = columns
        return cls(ids.long(), roles.long(), kept, text)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompts:
    """Some prompts side by side, padded on the left; `mask` is 1 at tokens."""

    ids: Int[Tensor, "batch positions"]
    mask: Int[Tensor, "batch positions"]
    roles: Int[Tensor, "batch positions"]
    kept: Bool[Tensor, "batch positions"]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], *, pad: int = 0) -> Prompts:
        """These prompts, in this order; `pad` is the token id that fills up."""
        if not prompts:
            raise TextError("expected at least one prompt; got none.")
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), pad)
        mask, roles = torch.zeros_like(ids), torch.full_like(ids, ROLES.index("template"))
        kept = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            part = slice(longest - len(prompt), None)
            ids[row, part], roles[row, part], kept[row, part] = prompt.ids, prompt.roles, prompt.kept
            mask[row, part] = 1
        return cls(ids, mask, roles, kept)

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """How many tokens each prompt has."""
        return self.mask.sum(1)

    def seen(self, position: Int[Tensor, "batch positions"]) -> SeenTokens:
        """Who speaks the tokens at these positions of the texts, and where they lie in the reply."""
        lengths = self.lengths.to(position.device)[:, None]
        reply = position - lengths
        role = self._at(position, self.roles.to(position.device))
        return SeenTokens(position, torch.where(reply < 0, role, _ASSISTANT), reply)

    def keeps(self, position: Int[Tensor, "batch positions"]) -> Bool[Tensor, "batch positions"]:
        """Whether the prompts' own tokens at these positions are kept; true behind them."""
        reply = position - self.lengths.to(position.device)[:, None]
        return (reply >= 0) | self._at(position, self.kept.to(position.device))

    def differs(
        self, position: Int[Tensor, "batch positions"], ids: Int[Tensor, "batch positions"]
    ) -> Bool[Tensor, "batch positions"]:
        """Where texts have other tokens, at these positions, than the prompts; False behind them."""
        inside = position < self.lengths.to(position.device)[:, None]
        return inside & (self._at(position, self.ids.to(position.device)) != ids.to(position.device))

    def _at(self, position: Tensor, column: Tensor) -> Tensor:
        """A column of the prompts by position, anything behind them."""
        padding = (self.mask.shape[1] - self.lengths).to(position.device)[:, None]
        return column.gather(1, (position + padding).clamp(max=column.shape[1] - 1))


def read_prompt(content: Content, tokenizer: Tokenizer, *, drop: Sequence[Drop] = ("bos", "pad")) -> Prompt:
    """A prompt from a text or from messages; `drop` names the tokens that no edit touches, as no row had them."""
    document = Document.of(content, dataset="the prompts")
    if not document.content:
        raise TextError("expected a prompt that says something; got an empty one.")
    rendered = _rendered(document, tokenizer)
    encoder = Encoder(tokenizer, tuple(drop))
    opening, tokens = encoder.opening(), encoder.encode_rendered(rendered, separator=False)
    whole = tokens if opening is None else Tokens.join([opening, tokens])
    columns = (torch.from_numpy(column) for column in (whole.ids, whole.roles, whole.kept))
    ids, roles, kept = columns
    return Prompt(ids.long(), roles.long(), kept, rendered.text)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """The numbers of the prompts, those of similar length together, at most `size` of them at a time."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    return (order[start : start + size] for start in range(0, len(order), size))


def _rendered(document: Document, tokenizer: Tokenizer) -> Rendered:
    return render(document, tokenizer) if isinstance(document.content, str) else awaiting_reply(document, tokenizer)
