"""Which latents are dead: those that no training row has activated for a given number of rows.

Counted on the codes of the training step itself, so that logging and validation cannot disturb it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from crosscoder.activity import Activity


class DeadLatents(nn.Module):
    """Rows since each latent last fired."""

    def __init__(self, num_latents: int, *, after_rows: int) -> None:
        super().__init__()
        self.after_rows = after_rows
        self.rows_since_fired: Tensor
        self.register_buffer("rows_since_fired", torch.zeros(num_latents, dtype=torch.int64))

    @torch.no_grad()
    def update(self, activity: Activity) -> None:
        """Count the rows of one training step."""
        self.rows_since_fired += activity.num_rows
        self.rows_since_fired.masked_fill_(activity.by_latent > 0, 0)

    @property
    def ids(self) -> Int[Tensor, "dead"]:
        """The dead latents."""
        return (self.rows_since_fired >= self.after_rows).nonzero().squeeze(1)

    @property
    def count(self) -> int:
        """How many latents are dead."""
        return int((self.rows_since_fired >= self.after_rows).sum())

    def taking_turns(self, step: int, *, at_most: int) -> Int[Tensor, "dead"]:
        """Up to `at_most` dead latents, another stretch of them at every step."""
        dead = self.ids
        if dead.shape[0] <= at_most:
            return dead
        return dead.roll(-(step * at_most) % dead.shape[0])[:at_most].sort().values

    def without_waiting(self, step: int, *, at_most: int) -> tuple[Int[Tensor, "some"], Bool[Tensor, "some"]]:
        """The same latents on a device that is not to be waited for: filled up with living ones, and which are dead."""
        dead = self.rows_since_fired >= self.after_rows
        count = dead.sum()
        turn = (dead.cumsum(0) - 1 - step * at_most) % count.clamp(min=1)
        chosen = torch.where(dead, turn, len(dead)).topk(min(at_most, len(dead)), largest=False).indices.sort().values
        return chosen, dead[chosen]
