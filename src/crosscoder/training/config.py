"""The configuration of a run: `run.yaml` and `RunConfig` are the same object.

Everything but models, sources, text and size has a default. `None` means "derive": `RunConfig.resolved` derives, and a
run directory keeps the resolved file. Reading, overriding and explaining problems: `training/runfile.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from crosscoder.capture import ModelConfig
from crosscoder.capture.text import TextConfig
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, ReLU, TopK
from crosscoder.sources import SourceSet, split_key
from crosscoder.training import runfile
from crosscoder.wiring import LatentGroup, Wiring, acausal

FORMAT = "crosscoder.run/1"


def _whole(value: object) -> object:
    """`1e8` is a fine way to write a count; `1.5` is not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """One block of a run file: frozen, keyword-only, and closed to keys that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LiveActivations(Settings):
    """Activations computed while training, held in a buffer that is shuffled and refilled."""

    kind: Literal["live"] = Field(default="live", description="Activations are computed while training.")
    buffer_gb: float = Field(
        default=2.0, gt=0, description="Memory for the buffer of activations, in units of 1e9 bytes."
    )
    passes: Count = Field(
        default=1, description="How often each fill of the buffer is served, shuffled anew every time."
    )


class NormaliserConfig(Settings):
    """How mean and scale of every source are fitted, once, before the first step."""

    num_tokens: Count = Field(
        default=1_000_000, description="Training rows that the mean and scale of each source come from."
    )


class AcausalConfig(Settings):
    """Every latent reads and writes every source."""

    kind: Literal["acausal"] = Field(default="acausal", description="Every latent reads and writes every source.")
    num_latents: Count = Field(description="Number of latents.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        return acausal(sources, num_latents=self.num_latents)


class SaeConfig(Settings):
    """A sparse autoencoder of one source."""

    kind: Literal["sae"] = Field(default="sae", description="A sparse autoencoder of one source.")
    num_latents: Count = Field(description="Number of latents.")
    source: str | None = Field(
        default=None, description="The source it reads and writes; null: the only one of the run."
    )

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over the one source."""
        key = sources.resolve(self.source or sources.keys[0]).key
        return Wiring(sources, [LatentGroup("all", self.num_latents, (key,), (key,))])


class BatchTopKConfig(Settings):
    """BatchTopK: k active latents per row on average over a batch, a calibrated threshold at inference."""

    kind: Literal["batch_topk"] = Field(
        default="batch_topk", description="Keep k latents per row, on average over a batch."
    )
    k: Count = Field(default=32, description="Active latents per row.")

    def build(self) -> Nonlinearity:
        """The nonlinearity that this describes."""
        return BatchTopK(k=self.k)


class TopKConfig(Settings):
    """TopK: exactly k active latents in every row, fewer where fewer are positive."""

    kind: Literal["topk"] = Field(default="topk", description="Keep k latents in every row.")
    k: Count = Field(default=32, description="Active latents per row.")

    def build(self) -> Nonlinearity:
        """The nonlinearity that this describes."""
        return TopK(k=self.k)


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
    code_norm: Literal["sum"] = Field(default="sum", description="sum: the norms over written sources, added up.")
    warmup_fraction: Fraction = Field(
        default=0.05, description="Part of the run in which the coefficient rises from zero."
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


class LossesConfig(Settings):
    """What is added to the reconstruction loss."""

    aux: AuxConfig = Field(default=AuxConfig(), description="The loss that brings dead latents back.")


class InitConfig(Settings):
    """Initial weights."""

    decoder_norm: float = Field(
        default=0.3, gt=0, description="Norm of each source's decoder row, in normalised space."
    )
    across_sources: Literal["same", "independent"] = Field(
        default="same", description="Whether a latent starts with the same direction at every source."
    )


class TrainConfig(Settings):
    """Length, step size and rhythm of a training run."""

    num_tokens: Count = Field(default=100_000_000, description="Rows to train on.")
    batch_size: Count = Field(default=4096, description="Rows per step.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Adam's step size after warm-up.")
    warmup_steps: Count | None = Field(
        default=None,
        description="Steps in which the learning rate rises from zero; null: 5 % of the run, 1,000 at most.",
    )
    decay_fraction: Fraction = Field(
        default=0.2, description="Last part of the run, in which the learning rate falls linearly to zero."
    )
    gradient_clip: float = Field(
        default=1.0, gt=0, description="Largest norm of the gradient; a longer one is scaled down."
    )
    k_start: Count | None = Field(
        default=None, description="k at the first step, where k is annealed; null: the final k."
    )
    k_anneal_fraction: Fraction = Field(
        default=0.0, description="First part of the run, in which k goes from k_start to k."
    )
    checkpoint_every: Count | None = Field(
        default=None, description="Steps between checkpoints; null: a tenth of the run."
    )
    evaluate_every: Count | None = Field(
        default=None, description="Steps between validations; null: a tenth of the run."
    )
    log_every: Count | None = Field(
        default=None, description="Steps between records of metrics; null: 1/500 of the run."
    )

    DERIVED: ClassVar[tuple[str, ...]] = (
        "warmup_steps",
        "k_start",
        "checkpoint_every",
        "evaluate_every",
        "log_every",
    )
    """What `resolved` fills in."""

    @property
    def num_steps(self) -> int:
        """Whole batches in `num_tokens`, at least one."""
        return max(1, self.num_tokens // self.batch_size)

    def resolved(self, *, k: int | None) -> Self:
        """The same settings with every derived value filled in."""
        steps = self.num_steps
        values = {
            "warmup_steps": min(1000, max(1, round(0.05 * steps))),
            "k_start": k,
            "checkpoint_every": max(1, steps // 10),
            "evaluate_every": max(1, steps // 10),
            "log_every": max(1, steps // 500),
        }
        return self.model_copy(update={key: value for key, value in values.items() if getattr(self, key) is None})


WiringConfig = Annotated[AcausalConfig | SaeConfig, Field(discriminator="kind")]
NonlinearityConfig = Annotated[BatchTopKConfig | TopKConfig | ReLUConfig, Field(discriminator="kind")]
SparsityConfig = Annotated[NoSparsity | L1Sparsity, Field(discriminator="kind")]


class RunConfig(Settings):
    """A whole run: which models and sources, which text, which dictionary, how it is trained, where it goes.

    `RunConfig.load("run.yaml", overrides=["train.learning_rate=3e-4"])` reads a file; `dump` writes one.
    """

    format: Literal["crosscoder.run/1"] = Field(default=FORMAT, description="What this file is, and its version.")
    seed: int = Field(
        default=0, ge=0, description="The one seed: initial weights, order of data and split derive from it."
    )
    models: dict[str, ModelConfig] = Field(min_length=1, description="The models under study, by short alias.")
    sources: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        min_length=1, description="Places to read and write, each as alias/site."
    )
    text: TextConfig = Field(description="The text that the models read.")
    activations: LiveActivations = Field(default=LiveActivations(), description="Where activations come from.")
    normaliser: NormaliserConfig = Field(default=NormaliserConfig(), description="How sources are normalised.")
    wiring: WiringConfig = Field(description="Which latents read and write which sources.")
    nonlinearity: NonlinearityConfig = Field(default=BatchTopKConfig(), description="Which latents stay on.")
    sparsity: SparsityConfig = Field(default=NoSparsity(), description="The penalty on the code.")
    losses: LossesConfig = Field(default=LossesConfig(), description="Further terms of the loss.")
    init: InitConfig = Field(default=InitConfig(), description="Initial weights.")
    train: TrainConfig = Field(default=TrainConfig(), description="Length, step size and rhythm.")
    out: str | None = Field(default=None, description="The run directory; null: runs/ and the run file's name.")

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, raw: Any) -> Any:
        """A block that does not say its kind is of the default one: `nonlinearity: {k: 8}`."""
        if not isinstance(raw, dict):
            return raw
        kinds = {name: getattr(field.default, "kind", None) for name, field in cls.model_fields.items()}
        blocks = {name: value for name, value in raw.items() if isinstance(value, dict) and kinds.get(name)}
        return raw | {name: {"kind": kinds[name], **value} for name, value in blocks.items()}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Sources name models of this run, each once; the penalty and the nonlinearity go together."""
        keys = ["/".join(split_key(key)) for key in self.sources]
        unknown = [key for key in keys if key.split("/")[0] not in self.models]
        if unknown:
            raise ValueError(
                f"sources: no model is called as in {', '.join(unknown)}; there are {', '.join(self.models)}"
            )
        if len(set(keys)) < len(keys):
            raise ValueError("sources: every source can be named once")
        if self.text.tokenizer not in self.models:
            raise ValueError(f"text.tokenizer: expected one of {', '.join(self.models)}; got {self.text.tokenizer!r}")
        self._agree_on_size()
        return self

    def _agree_on_size(self) -> None:
        k = self.k
        if k is not None and k > self.wiring.num_latents:
            raise ValueError(
                f"nonlinearity.k: expected at most wiring.num_latents = {self.wiring.num_latents}; got {k}"
            )
        if k is None and isinstance(self.sparsity, NoSparsity):
            raise ValueError("sparsity.kind: expected l1 with nonlinearity.kind = relu; got none")
        if isinstance(self.wiring, SaeConfig) and self.wiring.source is None and len(self.sources) != 1:
            raise ValueError(f"wiring.source: expected one of {', '.join(self.sources)}; it is missing")

    @property
    def k(self) -> int | None:
        """Active latents per row, where the nonlinearity fixes them."""
        return None if isinstance(self.nonlinearity, ReLUConfig) else self.nonlinearity.k

    def rows_per_fill(self, bytes_per_row: int) -> int:
        """Rows in one fill of the buffer: what `buffer_gb` holds, and no more than the run will ever ask for."""
        asked = max(-(-self.train.num_tokens // self.activations.passes), self.normaliser.num_tokens)
        return min(int(self.activations.buffer_gb * 1e9 / bytes_per_row), asked + self.text.context_length)

    def resolved(self, *, widths: Sequence[int]) -> Self:
        """The same run with every derived value filled in; `widths` are those of the written sources."""
        aux = {
            "max_latents": max(1, round(sum(widths) / len(widths) / 2)),
            "dead_after_tokens": min(10_000_000, max(1, self.train.num_tokens // 20)),
        }
        missing = {key: value for key, value in aux.items() if getattr(self.losses.aux, key) is None}
        changes: dict[str, Any] = {
            "losses": LossesConfig(aux=self.losses.aux.model_copy(update=missing)),
            "train": self.train.resolved(k=self.k),
            "out": self.out or "runs/run",
        }
        return self.model_copy(update=changes)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """The run that a file describes, with `key.path=value` overrides applied before validation.

        Raises UnknownKey or ConfigError with every problem in one message.
        """
        path = Path(path)
        raw = runfile.override(runfile.read(path), overrides, schema=cls)
        raw.setdefault("out", f"runs/{path.stem}")
        return runfile.validate(cls, raw, name=str(path))

    def dump(self, path: str | Path) -> None:
        """Write the run file, keys in the order of this class."""
        runfile.write(Path(path), self.model_dump(mode="json"))

    def differences(self, other: RunConfig) -> list[runfile.Difference]:
        """Keys whose values differ; a value that this run leaves to be derived differs from none."""
        mine = runfile.flatten(self.model_dump(mode="json"))
        theirs = runfile.flatten(other.model_dump(mode="json"))
        keys = [*mine, *(key for key in theirs if key not in mine)]
        pairs = [runfile.Difference(key, mine.get(key), theirs.get(key)) for key in keys]
        derived = {"out", "losses.aux.max_latents", "losses.aux.dead_after_tokens"}
        derived |= {f"train.{key}" for key in TrainConfig.DERIVED}
        return [d for d in pairs if d.mine != d.theirs and not (d.mine is None and d.key in derived)]
