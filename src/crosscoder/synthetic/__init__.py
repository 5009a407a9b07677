"""Worlds whose truth is known, and how much of it a crosscoder recovers.

world = ConceptWorld(feb25_toy("tight"), seed=0)       an ActivationSource; world.truth says what was planted
exclusive_recovery(crosscoder, world.truth, a="base", b="chat").recall
"""

from crosscoder.synthetic.curves import Densities, PowerCurve, densities, recall_by_frequency
from crosscoder.synthetic.description import (
    ConceptGroup,
    Constant,
    Correlation,
    Decaying,
    Exponential,
    Independent,
    LinearMap,
    LogUniform,
    Rotation,
    Same,
    Turned,
    Uniform,
    WorldConfig,
    WorldSource,
)
from crosscoder.synthetic.matching import Matching, assign, cosines, match, matching
from crosscoder.synthetic.presets import dedicated_toy, feb25_toy, layer_world, narrow_exclusive, null_world
from crosscoder.synthetic.recovery import (
    CUTS,
    VERDICTS,
    Cuts,
    ExclusiveRecovery,
    exclusive_recovery,
    exclusivity,
    firing_density,
)
from crosscoder.synthetic.spans import SpanRecovery, span_recovery
from crosscoder.synthetic.truth import Truth, plant
from crosscoder.synthetic.world import ConceptWorld, Drawn

__all__ = [
    "CUTS",
    "VERDICTS",
    "ConceptGroup",
    "ConceptWorld",
    "Constant",
    "Correlation",
    "Cuts",
    "Decaying",
    "Densities",
    "Drawn",
    "ExclusiveRecovery",
    "Exponential",
    "Independent",
    "LinearMap",
    "LogUniform",
    "Matching",
    "PowerCurve",
    "Rotation",
    "Same",
    "SpanRecovery",
    "Truth",
    "Turned",
    "Uniform",
    "WorldConfig",
    "WorldSource",
    "assign",
    "cosines",
    "dedicated_toy",
    "densities",
    "exclusive_recovery",
    "exclusivity",
    "feb25_toy",
    "firing_density",
    "layer_world",
    "match",
    "matching",
    "narrow_exclusive",
    "null_world",
    "plant",
    "recall_by_frequency",
    "span_recovery",
]
