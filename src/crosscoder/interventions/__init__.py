"""Interventions: edits of activations through latents, and what they do to what a model says."""

from crosscoder.interventions.codes import code_rule
from crosscoder.interventions.editing import editing
from crosscoder.interventions.edits import Edit, ablate, add, clamp, scale
from crosscoder.interventions.prompts import Prompt, Prompts, read_prompt
from crosscoder.interventions.selections import (
    AllTokens,
    Positions,
    PromptTokens,
    ReplyTokens,
    Roles,
    SeenTokens,
    TokenSelection,
)

__all__ = [
    "AllTokens",
    "Edit",
    "Positions",
    "Prompt",
    "PromptTokens",
    "Prompts",
    "ReplyTokens",
    "Roles",
    "SeenTokens",
    "TokenSelection",
    "ablate",
    "add",
    "clamp",
    "code_rule",
    "editing",
    "read_prompt",
    "scale",
]
