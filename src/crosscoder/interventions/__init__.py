"""Interventions: edits of activations through latents, and what they do to what a model says."""

from crosscoder.interventions.attribution import AttributionPath, gradient_times_activation, integrated_gradients
from crosscoder.interventions.attributions import Attribution, RelativeIndirectEffect, relative_indirect_effect
from crosscoder.interventions.behaviour import Behaviour, Rate, contains, matches
from crosscoder.interventions.codes import code_rule
from crosscoder.interventions.editing import editing
from crosscoder.interventions.edits import Edit, ablate, add, clamp, scale
from crosscoder.interventions.effects import EffectsPlan, LatentEffects, effects
from crosscoder.interventions.metrics import ContinuationLogProbability, LogitDifference, Metric, NextTokenLoss
from crosscoder.interventions.patching import PatchingPlan, patching
from crosscoder.interventions.patching_curves import Condition, Estimate, PatchingCurves
from crosscoder.interventions.prompts import Prompt, Prompts, read_prompt
from crosscoder.interventions.rankings import rank_sum, ranked
from crosscoder.interventions.reading import as_context, continued
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
    MatchedSet,
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
    "Attribution",
    "AttributionPath",
    "Behaviour",
    "Condition",
    "ContinuationLogProbability",
    "Dose",
    "DoseResult",
    "Edit",
    "EffectsPlan",
    "Estimate",
    "LatentEffects",
    "LogitDifference",
    "MatchedSet",
    "Metric",
    "NextTokenLoss",
    "PatchingCurves",
    "PatchingPlan",
    "Positions",
    "Prompt",
    "PromptTokens",
    "Prompts",
    "Rate",
    "RelativeIndirectEffect",
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
    "as_context",
    "clamp",
    "code_rule",
    "contains",
    "continued",
    "doses",
    "editing",
    "effects",
    "gradient_times_activation",
    "integrated_gradients",
    "matched_sets",
    "matches",
    "patching",
    "rank_sum",
    "ranked",
    "read_prompt",
    "relative_indirect_effect",
    "scale",
    "side_effects",
    "smallest_set",
    "steer",
    "suppressed",
    "suppression_curve",
]
