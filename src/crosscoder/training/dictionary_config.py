"""Blocks of a run file about the dictionary itself: nonlinearity, sparsity, further losses, initial weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from crosscoder.errors import ConfigError
from crosscoder.nonlinearities import BatchTopK, CodeNorm, JumpReLU, Nonlinearity, ReLU, TopK
from crosscoder.training.settings import Count, Fraction, Settings

_CODE_NORM = "Norm of a latent's decoders: sum over sources, concat (root of squares), max, or none."


class BatchTopKConfig(Settings):
    """BatchTopK: k active latents per row on average over a batch, a calibrated threshold at inference."""

    kind: Literal["batch_topk"] = Field(
        default="batch_topk", description="Keep k latents per row, on average over a batch."
    )
    k: Count = Field(default=32, description="Active latents per row.")
    code_norm: CodeNorm = Field(default="sum", description=_CODE_NORM + " Scores are values times it.")

    def build(self) -> Nonlinearity:
        """The nonlinearity that this describes."""
        return BatchTopK(k=self.k, code_norm=self.code_norm)


class TopKConfig(Settings):
    """TopK: exactly k active latents in every row, fewer where fewer are positive."""

    kind: Literal["topk"] = Field(default="topk", description="Keep k latents in every row.")
    k: Count = Field(default=32, description="Active latents per row.")
    code_norm: CodeNorm = Field(default="sum", description=_CODE_NORM + " Scores are values times it.")

    def build(self) -> Nonlinearity:
        """The nonlinearity that this describes."""
        return TopK(k=self.k, code_norm=self.code_norm)


class JumpReLUConfig(Settings):
    """JumpReLU: a learned threshold per latent; needs a penalty, tanh by the published recipe."""

    kind: Literal["jump_relu"] = Field(default="jump_relu", description="Keep what exceeds a learned threshold.")
    bandwidth: float = Field(default=2.0, gt=0, description="Window in which the threshold gets a gradient.")
    initial_threshold: float = Field(default=0.1, gt=0, description="Where every threshold starts.")

    def build(self) -> Nonlinearity:
        """The nonlinearity that this describes."""
        return JumpReLU(bandwidth=self.bandwidth, initial_threshold=self.initial_threshold)


class ReLUConfig(Settings):
    """ReLU: sparsity comes from a penalty, so `sparsity.kind` has to be one."""

    kind: Literal["relu"] = Field(
        default="relu", description="Keep what is positive; the sparsity penalty does the rest."
    )

    def build(self) -> Nonlinearity:
        """The nonlinearity that this describes."""
        return ReLU()


class NoSparsity(Settings):
    """No penalty: the nonlinearity alone makes codes sparse."""

    kind: Literal["none"] = Field(default="none", description="No penalty on the code.")


class L1Sparsity(Settings):
    """`coefficient · Σ_i f_i · n_i`, where n_i is the code norm of latent i."""

    kind: Literal["l1"] = Field(default="l1", description="The values of active latents, times their decoder norms.")
    coefficient: float = Field(gt=0, description="Weight of the penalty in the loss.")
    code_norm: CodeNorm = Field(default="sum", description=_CODE_NORM)
    warmup_fraction: Fraction = Field(
        default=0.05, description="Part of the run in which the coefficient rises from zero."
    )


class TanhSparsity(Settings):
    """`coefficient · Σ_i tanh(scale · f_i · n_i)`, and a small penalty on pre-activations below their threshold."""

    kind: Literal["tanh"] = Field(default="tanh", description="A count of active latents that saturates smoothly.")
    coefficient: float = Field(gt=0, description="Weight of the penalty in the loss at the end of its warm-up.")
    scale: float = Field(default=4.0, gt=0, description="How fast tanh saturates.")
    preactivation: float = Field(
        default=3e-6,
        ge=0,
        description="Weight of the penalty that pulls silent latents towards their threshold, under jump_relu.",
    )
    code_norm: CodeNorm = Field(default="sum", description=_CODE_NORM)
    warmup_fraction: Fraction = Field(
        default=1.0, description="Part of the run in which the coefficient rises from zero."
    )


class AuxConfig(Settings):
    """AuxK: latents that no longer fire reconstruct what the others left over."""

    coefficient: float = Field(default=0.03125, ge=0, description="Weight of the auxiliary loss; 0 switches it off.")
    max_latents: Count | None = Field(
        default=None,
        description="Dead latents used per row, at most; null: half the mean width of the written sources.",
    )
    dead_after_tokens: Count | None = Field(
        default=None,
        description="Rows without firing that make a latent dead; null: 10 million or 5 % of the run, the smaller.",
    )


class DeltaConfig(Settings):
    """The delta loss: the error of the difference between two sources."""

    coefficient: float = Field(default=1.0, gt=0, description="Weight of the delta loss.")
    a: str = Field(description="One source, or the alias of its model.")
    b: str = Field(description="The other one; the difference is b minus a.")

    @property
    def pair(self) -> tuple[str, str]:
        """Both."""
        return self.a, self.b


class LossesConfig(Settings):
    """What is added to the reconstruction loss, and what the encoder is not shown."""

    aux: AuxConfig = Field(default=AuxConfig(), description="The loss that brings dead latents back.")
    delta: DeltaConfig | None = Field(default=None, description="A loss on the difference of two sources.")
    source_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Chance that the encoder does not see a source of a row."
    )


class WarmStartConfig(Settings):
    """Initial weights from sparse autoencoders that were trained on one source each."""

    dictionaries: dict[str, str] = Field(
        min_length=1, description="Source, as alias/site, to the run, directory or Hub id of its autoencoder."
    )
    similarity: float = Field(
        default=0.7, gt=0, le=1, description="Correlation of values above which latents of two sources become one."
    )


class InitConfig(Settings):
    """Initial weights."""

    decoder_norm: float = Field(
        default=0.3, gt=0, description="Norm of each source's decoder row, in normalised space."
    )
    across_sources: Literal["same", "independent"] = Field(
        default="same", description="Whether a latent starts with the same direction at every source."
    )
    firing_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Part of the rows that encoder biases let each latent fire on at first; null: biases start at 0.",
    )
    warm_start: WarmStartConfig | None = Field(
        default=None, description="Autoencoders of single sources to start from; null: random directions."
    )


def check_penalty(nonlinearity: Nonlinearity, sparsity: NoSparsity | L1Sparsity | TanhSparsity) -> None:
    """Raises ConfigError for a penalty under TopK or BatchTopK, where k alone makes codes sparse."""
    if isinstance(nonlinearity, TopK | BatchTopK) and not isinstance(sparsity, NoSparsity):
        raise ConfigError(
            f"sparsity.kind: expected none with nonlinearity.kind = {nonlinearity.kind}; got {sparsity.kind}",
            hint="There k makes codes sparse; a penalty would only shrink what k keeps.",
        )


NonlinearityConfig = Annotated[BatchTopKConfig | TopKConfig | JumpReLUConfig | ReLUConfig, Field(discriminator="kind")]
SparsityConfig = Annotated[NoSparsity | L1Sparsity | TanhSparsity, Field(discriminator="kind")]
