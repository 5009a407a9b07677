"""Analysis: what a crosscoder keeps, which latents belong to which source, what they mean, and what controls say.

Functions of a crosscoder and activations that return small dataclasses; `evaluate_run` and `diff_run` take whole runs.
"""

from crosscoder.analysis.amplification import Amplification, Carried, amplification
from crosscoder.analysis.bootstrap import Bootstrap
from crosscoder.analysis.class_comparison import ClassComparison, ExclusiveAgainstShared, exclusive_against_shared
from crosscoder.analysis.classes import CUTOFFS, CutOffs, LatentClasses, Twins, latent_classes, relative_norm, twins
from crosscoder.analysis.co_activation import CoActivation, CoActivationSums
from crosscoder.analysis.contrasts import Contrast, HeldOutContrast, contrast, fires_on, held_out_contrast
from crosscoder.analysis.control_plan import WantedControls
from crosscoder.analysis.control_runs import plan_controls, run_controls
from crosscoder.analysis.controls import Band, CountsBeyond, counts_beyond, null_band
from crosscoder.analysis.cross_entropy import CrossEntropy
from crosscoder.analysis.emergence import Emergence, OneAgainstAll, emergence, one_against_all
from crosscoder.analysis.evaluation import Evaluation, evaluate
from crosscoder.analysis.exemplar_vectors import exemplar_vectors
from crosscoder.analysis.exemplars import Exemplars
from crosscoder.analysis.firing_pairs import FiringPairs, co_firing, twin_firing
from crosscoder.analysis.label_scores import LabelScore, LabelScores, label_scores
from crosscoder.analysis.labels import LabelSpan, read_labels
from crosscoder.analysis.latent_matches import JointSums, LatentMatches, decoder_matches
from crosscoder.analysis.latent_scaling import LatentScaling, ScalingIntervals, latent_scaling, scaling
from crosscoder.analysis.logit_lens import LogitLens, logit_lens
from crosscoder.analysis.matched_latents import MatchedLatents, matched_latents
from crosscoder.analysis.pair_controls import PairControls, read_controls
from crosscoder.analysis.polysemanticity import Polysemanticity, polysemanticity
from crosscoder.analysis.profiles import NormProfiles, cosine_matrices, norm_profiles
from crosscoder.analysis.prompt_facts import EncodedPrompts, LatentFacts, latent_facts
from crosscoder.analysis.prompt_text import PromptText, read_prompts
from crosscoder.analysis.prompts import PromptCode, PromptValues, encode_prompts
from crosscoder.analysis.runs import Diff, Labelled, diff_run, evaluate_run
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.analysis.source_activity import SourceActivity, source_activity
from crosscoder.analysis.specificity import Specificity, specificity
from crosscoder.analysis.stability import SeedStability, seed_stability
from crosscoder.analysis.statistics import DensityFlags, LatentStatistics, density_flags

__all__ = [
    "Amplification",
    "Band",
    "Bootstrap",
    "CUTOFFS",
    "Carried",
    "ClassComparison",
    "CoActivation",
    "CoActivationSums",
    "Contrast",
    "CountsBeyond",
    "CrossEntropy",
    "CutOffs",
    "DensityFlags",
    "Diff",
    "Emergence",
    "EncodedPrompts",
    "Evaluation",
    "ExclusiveAgainstShared",
    "Exemplars",
    "FiringPairs",
    "HeldOutContrast",
    "JointSums",
    "LabelScore",
    "LabelScores",
    "LabelSpan",
    "Labelled",
    "LatentClasses",
    "LatentFacts",
    "LatentMatches",
    "LatentScaling",
    "LatentStatistics",
    "LogitLens",
    "MatchedLatents",
    "NormProfiles",
    "OneAgainstAll",
    "PairControls",
    "Polysemanticity",
    "PromptCode",
    "PromptText",
    "PromptValues",
    "ScalingIntervals",
    "ScalingSums",
    "SeedStability",
    "SourceActivity",
    "Specificity",
    "Twins",
    "WantedControls",
    "amplification",
    "co_firing",
    "contrast",
    "cosine_matrices",
    "counts_beyond",
    "decoder_matches",
    "density_flags",
    "diff_run",
    "emergence",
    "encode_prompts",
    "evaluate",
    "evaluate_run",
    "exclusive_against_shared",
    "exemplar_vectors",
    "fires_on",
    "held_out_contrast",
    "label_scores",
    "latent_classes",
    "latent_facts",
    "latent_scaling",
    "logit_lens",
    "matched_latents",
    "norm_profiles",
    "null_band",
    "one_against_all",
    "plan_controls",
    "polysemanticity",
    "read_controls",
    "read_labels",
    "read_prompts",
    "relative_norm",
    "run_controls",
    "scaling",
    "seed_stability",
    "source_activity",
    "specificity",
    "twin_firing",
    "twins",
]
