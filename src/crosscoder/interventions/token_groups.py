"""Which tokens a figure is about: all, the first tokens of responses, template tokens, or those of one role.

all              every row's position
response         positions whose next token is the assistant's: they predict it, from the first token on
first <n>        of every response, the first n such positions
<role>           positions whose own token has that role (text, system, user, assistant, template)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.interventions.reading import TokenBlock

_ASSISTANT = ROLES.index("assistant")


def token_groups(block: TokenBlock, *, first: int) -> dict[str, Bool[Tensor, "contexts positions"]]:
    """The positions of every group that figures are given for."""
    place = response_places(block)
    groups = {"all": block.kept, "response": place > 0, f"first {first}": (place > 0) & (place <= first)}
    groups |= {role: block.roles == number for number, role in enumerate(ROLES)}
    return {name: positions & block.kept for name, positions in groups.items()}


def response_places(block: TokenBlock) -> Int[Tensor, "contexts positions"]:
    """At each position the number, from 1, within its response of the token that it predicts; 0 outside responses."""
    following = torch.roll(block.roles, -1, dims=1) == _ASSISTANT
    following &= torch.roll(block.real, -1, dims=1)
    following[:, -1] = False
    seen = following.long().cumsum(1)
    before = torch.where(following, 0, seen).cummax(1).values
    return torch.where(following, seen - before, 0)
