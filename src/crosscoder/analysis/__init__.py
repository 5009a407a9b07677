"""Analysis: what a crosscoder keeps, which latents belong to which source, what they mean, and what controls say.

Functions of a crosscoder and activations that return small dataclasses; `evaluate_run` and `diff_run` take whole runs.
"""

from crosscoder.analysis.bootstrap import Bootstrap
from crosscoder.analysis.classes import CUTOFFS, CutOffs, LatentClasses, Twins, latent_classes, relative_norm, twins
from crosscoder.analysis.controls import Band, CountsBeyond, counts_beyond, null_band
from crosscoder.analysis.cross_entropy import CrossEntropy
from crosscoder.analysis.emergence import Emergence, OneAgainstAll, emergence, one_against_all
from crosscoder.analysis.evaluation import Evaluation, evaluate
from crosscoder.analysis.exemplars import Exemplars
from crosscoder.analysis.label_scores import LabelScore, LabelScores, label_scores
from crosscoder.analysis.labels import LabelSpan, read_labels
from crosscoder.analysis.latent_scaling import LatentScaling, ScalingIntervals, latent_scaling, scaling
from crosscoder.analysis.logit_lens import LogitLens, logit_lens
from crosscoder.analysis.pair_controls import PairControls, read_controls
from crosscoder.analysis.runs import Diff, diff_run, evaluate_run
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.analysis.statistics import LatentStatistics

__all__ = [
    "Band",
    "Bootstrap",
    "CUTOFFS",
    "CountsBeyond",
    "CrossEntropy",
    "CutOffs",
    "Diff",
    "Emergence",
    "Evaluation",
    "Exemplars",
    "LabelScore",
    "LabelScores",
    "LabelSpan",
    "LatentClasses",
    "LatentScaling",
    "LatentStatistics",
    "LogitLens",
    "OneAgainstAll",
    "PairControls",
    "ScalingIntervals",
    "ScalingSums",
    "Twins",
    "counts_beyond",
    "diff_run",
    "emergence",
    "evaluate",
    "evaluate_run",
    "label_scores",
    "latent_classes",
    "latent_scaling",
    "logit_lens",
    "null_band",
    "one_against_all",
    "read_controls",
    "read_labels",
    "relative_norm",
    "scaling",
    "twins",
]
