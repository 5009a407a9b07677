"""Interventions: edits of activations through latents, and what they do to what a model says."""

from crosscoder.interventions.behaviour import Behaviour, Rate, contains, matches
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
from crosscoder.interventions.side_effects import SideEffects, UnrelatedText, side_effects
from crosscoder.interventions.steering import Dose, DoseResult, Steering, Trial, doses, steer
from crosscoder.interventions.subject import Sampling, Subject
from crosscoder.interventions.suppression import (
    SmallestSet,
    SuppressedSet,
    SuppressionCurve,
    matched_sets,
    smallest_set,
    suppressed,
    suppression_curve,
)

__all__ = [
    "AllTokens",
    "Behaviour",
    "Dose",
    "DoseResult",
    "Edit",
    "Positions",
    "Prompt",
    "PromptTokens",
    "Prompts",
    "Rate",
    "ReplyTokens",
    "Roles",
    "Sampling",
    "SeenTokens",
    "SideEffects",
    "SmallestSet",
    "Steering",
    "Subject",
    "SuppressedSet",
    "SuppressionCurve",
    "TokenSelection",
    "Trial",
    "UnrelatedText",
    "ablate",
    "add",
    "clamp",
    "code_rule",
    "contains",
    "doses",
    "editing",
    "matched_sets",
    "matches",
    "read_prompt",
    "scale",
    "side_effects",
    "smallest_set",
    "steer",
    "suppressed",
    "suppression_curve",
]
