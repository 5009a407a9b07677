"""Absolute positions inside a running forward pass, whether its text comes whole or one token at a time."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn


def padded_positions(attention_mask: Int[Tensor, "batch seen"]) -> Int[Tensor, "batch seen"]:
    """The position of each token within its own text: the first token that is not padding is at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class PositionTracker:
    """While entered, knows the positions that the model's `stem` is working on.

    They are the `position_ids` it was given, else follow from its attention mask and from how much its cache holds.
    """

    def __init__(self, stem: nn.Module) -> None:
        self._stem = stem
        self._given: Tensor | None = None
        self._start = 0

    def __enter__(self) -> PositionTracker:
        self._handle = self._stem.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def positions(self, x: Tensor) -> Int[Tensor, "batch positions"]:
        """The absolute position of every row of `x` (batch, positions, width)."""
        batch, length = x.shape[:2]
        if self._given is not None and self._given.shape[-1] == length:
            return self._given.to(x.device).expand(batch, length)
        return torch.arange(self._start, self._start + length, device=x.device).expand(batch, length)

    def _note(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        self._start = 0 if cache is None else int(cache.get_seq_length())
        self._given = given if given is None or given.ndim == 2 else None
