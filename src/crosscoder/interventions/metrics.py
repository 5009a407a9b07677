"""Metrics of behaviour: one number per context from a model's logits, differentiable, for attribution to latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.errors import EditError
from crosscoder.interventions.reading import TokenBlock, log_probabilities


class Metric(Protocol):
    """What a behaviour is measured by."""

    def __call__(
        self, logits: Float[Tensor, "contexts positions vocabulary"], block: TokenBlock
    ) -> Float[Tensor, "contexts"]:
        """One number for each context of the block; `block.numbers` says which contexts they are."""
        ...


@dataclass(frozen=True)
class LogitDifference:
    """`logit(right) − logit(wrong)` of the token after each context's last; one pair of token ids per context."""

    right: Int[Tensor, "all_contexts"]
    wrong: Int[Tensor, "all_contexts"]

    def __call__(
        self, logits: Float[Tensor, "contexts positions vocabulary"], block: TokenBlock
    ) -> Float[Tensor, "contexts"]:
        """The difference at the last token."""
        _check_number(block, len(self.right))
        last = logits[torch.arange(len(block.numbers)), block.lengths - 1]
        pair = torch.stack([self.right[block.numbers], self.wrong[block.numbers]], dim=1).to(logits.device)
        return last.gather(1, pair).diff(dim=1).squeeze(1).neg()


@dataclass(frozen=True)
class ContinuationLogProbability:
    """The log-probability (nats) of the end of each context, from position `start` on, given what is before it."""

    start: Int[Tensor, "all_contexts"]

    def __call__(
        self, logits: Float[Tensor, "contexts positions vocabulary"], block: TokenBlock
    ) -> Float[Tensor, "contexts"]:
        """Summed over the tokens of the continuation."""
        _check_number(block, len(self.start))
        start = self.start[block.numbers]
        if bool((start < 1).any()) or bool((start >= block.lengths).any()):
            raise EditError(
                "expected continuations that begin behind the first token and before the context's end.",
                details=[
                    f"start {s}, of {n} tokens" for s, n in zip(start.tolist(), block.lengths.tolist(), strict=True)
                ],
                hint="Give contexts that hold a prompt and its continuation: continued(prompt, tokens).",
            )
        inside = torch.arange(1, block.ids.shape[1]) >= start[:, None]
        return _summed(_next_log_probabilities(logits, block), inside & block.real[:, 1:])


@dataclass(frozen=True)
class NextTokenLoss:
    """The mean cross-entropy (nats) of each context's next tokens."""

    def __call__(
        self, logits: Float[Tensor, "contexts positions vocabulary"], block: TokenBlock
    ) -> Float[Tensor, "contexts"]:
        """The mean over all tokens but the first."""
        inside = block.real[:, 1:]
        total = _summed(_next_log_probabilities(logits, block), inside)
        return -total / inside.sum(1).clamp(min=1).to(total.device)


def _next_log_probabilities(logits: Tensor, block: TokenBlock) -> Float[Tensor, "contexts positions_but_one"]:
    following = block.ids[:, 1:, None].to(logits.device)
    return log_probabilities(logits[:, :-1]).gather(2, following).squeeze(2)


def _summed(values: Tensor, inside: Tensor) -> Float[Tensor, "contexts"]:
    return torch.where(inside.to(values.device), values, 0).sum(1)


def _check_number(block: TokenBlock, number: int) -> None:
    if int(block.numbers.max()) >= number:
        raise EditError(
            f"this metric is of {number} contexts; context {int(block.numbers.max())} came.",
            hint="Give the metric one entry for each context, in their order.",
        )
