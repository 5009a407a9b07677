"""Which tokens an edit acts on: small frozen descriptions, combined with `&`, `|` and `~`.

A selection is asked in every forward pass, about the tokens that are new in it: all of a text at once, or one at a time
while a reply is generated. Positions count within a token's own text, whatever padding is before it. Who speaks, and
where the reply begins, is known from the prompts that the pass was started with (`Prompts`); a token behind its prompt
is the assistant's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.errors import EditError, EmptySelection


@dataclass(frozen=True)
class SeenTokens:
    """The tokens of one forward pass: positions, and roles and places in the reply (below 0: prompt) where known."""

    position: Int[Tensor, "batch positions"]
    role: Int[Tensor, "batch positions"] | None = None
    reply: Int[Tensor, "batch positions"] | None = None


class TokenSelection(ABC):
    """A rule that says of every token whether an edit acts on it."""

    @abstractmethod
    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Whether each token is selected."""

    def __and__(self, other: TokenSelection) -> TokenSelection:
        return Both(self, other)

    def __or__(self, other: TokenSelection) -> TokenSelection:
        return Either(self, other)

    def __invert__(self) -> TokenSelection:
        return Not(self)


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every token."""

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """True everywhere."""
        return torch.ones_like(tokens.position, dtype=torch.bool)


@dataclass(frozen=True)
class Roles(TokenSelection):
    """Tokens of certain speakers: names of `activations.ROLES`. A generated token is the assistant's."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _refuse_empty(self.names, "roles")
        unknown = [name for name in self.names if name not in ROLES]
        if unknown:
            raise EditError(
                f"expected roles among {', '.join(ROLES)}; got {', '.join(unknown)}.", hint="Name one of these."
            )

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where one of them speaks."""
        role = _known(tokens.role)
        return torch.isin(role, torch.tensor([ROLES.index(name) for name in self.names], device=role.device))


@dataclass(frozen=True)
class Positions(TokenSelection):
    """Tokens at certain positions; the first of a text, BOS where there is one, is at 0."""

    at: tuple[int, ...]

    def __post_init__(self) -> None:
        _refuse_empty(self.at, "positions")
        if min(self.at) < 0:
            raise EditError(f"expected positions from 0 on; got {min(self.at)}.", hint="Count from the first token.")

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where the position is one of them."""
        return torch.isin(tokens.position, torch.tensor(self.at, device=tokens.position.device))


@dataclass(frozen=True)
class PromptTokens(TokenSelection):
    """Tokens of the prompt alone: nothing that was generated."""

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where the prompt is."""
        return _known(tokens.reply) < 0


@dataclass(frozen=True)
class ReplyTokens(TokenSelection):
    """Generated tokens alone; with `first`, only that many at the beginning of the reply."""

    first: int | None = None

    def __post_init__(self) -> None:
        if self.first is not None and self.first < 1:
            raise EmptySelection(
                f"expected at least the first token of the reply; got the first {self.first}.",
                hint="Give first=1 or more, or leave it out.",
            )

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where the reply is, or its beginning."""
        reply = _known(tokens.reply)
        return (reply >= 0) if self.first is None else (reply >= 0) & (reply < self.first)


@dataclass(frozen=True)
class Both(TokenSelection):
    """Tokens that both selections hold."""

    a: TokenSelection
    b: TokenSelection

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where both are true."""
        return self.a.mask(tokens) & self.b.mask(tokens)


@dataclass(frozen=True)
class Either(TokenSelection):
    """Tokens that one of two selections holds."""

    a: TokenSelection
    b: TokenSelection

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where one is true."""
        return self.a.mask(tokens) | self.b.mask(tokens)


@dataclass(frozen=True)
class Not(TokenSelection):
    """Tokens that a selection leaves out."""

    selection: TokenSelection

    def mask(self, tokens: SeenTokens) -> Bool[Tensor, "batch positions"]:
        """Where it is false."""
        return ~self.selection.mask(tokens)


def _refuse_empty(names: tuple[object, ...], what: str) -> None:
    if not names:
        raise EmptySelection(f"expected {what} to select tokens by; got none.", hint="Name at least one.")


def _known(column: Tensor | None) -> Tensor:
    if column is None:
        raise EditError(
            "this selection needs to know who speaks and where the reply begins, and no prompts were given.",
            hint="Give the prompts that the texts begin with: editing(..., prompts=Prompts.of(...)).",
        )
    return column
