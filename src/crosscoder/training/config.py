"""The configuration of a run: `run.yaml` and `RunConfig` are the same object.

Everything but models, sources, text and size has a default. `None` means "derive": `RunConfig.resolved` derives, and a
run directory keeps the resolved file. Reading, overriding and explaining problems: `training/runfile.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from crosscoder import nonlinearities
from crosscoder.capture import ModelConfig
from crosscoder.capture.text import TextConfig
from crosscoder.errors import ConfigError
from crosscoder.kernels.dispatch import Kernels, Precision
from crosscoder.sources import Source, SourceSet, difference, split_key
from crosscoder.training import runfile
from crosscoder.training.dictionary_config import (
    AuxConfig,
    BatchTopKConfig,
    DeltaConfig,
    InitConfig,
    JumpReLUConfig,
    L1Sparsity,
    LossesConfig,
    NonlinearityConfig,
    NoSparsity,
    ReLUConfig,
    SparsityConfig,
    TanhSparsity,
    TopKConfig,
    WarmStartConfig,
    check_penalty,
)
from crosscoder.training.null_pairs import NullConfig
from crosscoder.training.null_pairs import check as check_null_pair
from crosscoder.training.settings import Count, Fraction, Settings
from crosscoder.training.wiring_config import AcausalConfig, SaeConfig, WiringConfig

__all__ = [
    "FORMAT",
    "AcausalConfig",
    "AuxConfig",
    "BatchTopKConfig",
    "DeltaConfig",
    "DifferenceConfig",
    "InitConfig",
    "JumpReLUConfig",
    "L1Sparsity",
    "LiveActivations",
    "LossesConfig",
    "NoSparsity",
    "NormaliserConfig",
    "ReLUConfig",
    "RunConfig",
    "SaeConfig",
    "TanhSparsity",
    "TopKConfig",
    "TrainConfig",
    "WarmStartConfig",
]

FORMAT = "crosscoder.run/1"


class LiveActivations(Settings):
    """Activations computed while training, held in a buffer that is shuffled and refilled."""

    kind: Literal["live"] = Field(default="live", description="Activations are computed while training.")
    buffer_gb: float = Field(
        default=2.0, gt=0, description="Memory for the buffer of activations, in units of 1e9 bytes."
    )
    passes: Count = Field(
        default=1, description="How often each fill of the buffer is served, shuffled anew every time."
    )
    null_pair: NullConfig | None = Field(
        default=None, description="Make one source up from another, for a control; null: sources as models give them."
    )


class NormaliserConfig(Settings):
    """How mean and scale of every source are fitted, once, before the first step."""

    num_tokens: Count = Field(
        default=1_000_000, description="Training rows that the mean and scale of each source come from."
    )


class DifferenceConfig(Settings):
    """The source `x_a − x_b` of two models at one site: `{difference: [chat, base], site: layers.3.resid_post}`."""

    difference: Annotated[tuple[str, str], Field(strict=False)] = Field(
        description="Aliases of two models: the first minus the second."
    )
    site: str = Field(description="The site of both.")

    @property
    def parts(self) -> tuple[str, str]:
        """Keys of the two sources."""
        return f"{self.difference[0]}/{self.site}", f"{self.difference[1]}/{self.site}"


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
    micro_batches: Count = Field(
        default=1,
        description="Parts that a step's rows are worked through in, to save memory; BatchTopK selects within each.",
    )
    precision: Precision = Field(
        default="auto",
        description="auto or mixed: bf16 products propose what fp32 decides; float32: fp32 throughout. Same codes.",
    )
    kernels: Kernels = Field(
        default="auto", description="auto: Triton's on a CUDA device; torch: torch operations there too. Same codes."
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


class RunConfig(Settings):
    """A whole run: which models and sources, which text, which dictionary, how it is trained, where it goes.

    `RunConfig.load("run.yaml", overrides=["train.learning_rate=3e-4"])` reads a file; `dump` writes one.
    """

    format: Literal["crosscoder.run/1"] = Field(default=FORMAT, description="What this file is, and its version.")
    seed: int = Field(
        default=0, ge=0, description="The one seed: initial weights, order of data and split derive from it."
    )
    models: dict[str, ModelConfig] = Field(min_length=1, description="The models under study, by short alias.")
    sources: Annotated[tuple[str | DifferenceConfig, ...], Field(strict=False)] = Field(
        min_length=1, description="Places to read and write, each as alias/site, or a difference of two."
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
        """Sources name models of this run, each once; wiring, nonlinearity and penalty go together."""
        keys = ["/".join(split_key(key)) for key in self.harvested_keys]
        unknown = [key for key in keys if key.split("/")[0] not in self.models]
        if unknown:
            raise ValueError(
                f"sources: no model is called as in {', '.join(unknown)}; there are {', '.join(self.models)}"
            )
        named = [key for key in self.sources if isinstance(key, str)]
        if len({"/".join(split_key(key)) for key in named}) < len(named):
            raise ValueError("sources: every source can be named once")
        if self.text.tokenizer not in self.models:
            raise ValueError(f"text.tokenizer: expected one of {', '.join(self.models)}; got {self.text.tokenizer!r}")
        if self.text.alignment == "bytes" and self.text.tokenizer not in {key.split("/")[0] for key in keys}:
            raise ValueError(f"text.tokenizer: with alignment bytes, {self.text.tokenizer!r} must have a source")
        self._agree_on_dictionary()
        return self

    def _agree_on_dictionary(self) -> None:
        """What can be told of the dictionary before widths are known."""
        needs_penalty = isinstance(self.nonlinearity, ReLUConfig | JumpReLUConfig)
        if needs_penalty and isinstance(self.sparsity, NoSparsity):
            raise ValueError(
                f"sparsity.kind: expected l1 or tanh with nonlinearity.kind = {self.nonlinearity.kind}; got none"
            )
        check_penalty(self.nonlinearity.build(), self.sparsity)
        sources = self.source_set(dict.fromkeys(self.harvested_keys, 1))
        if self.activations.null_pair is not None:
            check_null_pair(self.activations.null_pair, sources)
        wiring = self.wiring.build(sources)
        nonlinearities.check(wiring, self.nonlinearity.build())
        if self.losses.delta is not None and len({wiring.writes.resolve(s) for s in self.losses.delta.pair}) < 2:
            raise ValueError("losses.delta: expected two different sources")
        if self.losses.source_dropout and len(wiring.reads) < 2:
            raise ValueError("losses.source_dropout: one source is read, and without it nothing is left to encode")
        start = self.init.warm_start
        if self.init.firing_fraction is not None and self.k is not None:
            raise ValueError(f"init.firing_fraction: under {self.nonlinearity.kind} k decides how often latents fire")
        if self.k is not None and self.train.k_start is not None:
            found = nonlinearities.budgets(wiring, self.k)
            nonlinearities.check_budgets(wiring, nonlinearities.scaled(found, self.train.k_start))
        if start is not None and self.init.firing_fraction is not None:
            raise ValueError("init: warm_start and firing_fraction both set the encoder biases; give one of them")
        for key in start.dictionaries if start is not None else ():
            wiring.writes.resolve(key)

    @property
    def harvested_keys(self) -> tuple[str, ...]:
        """Keys of all sources that models have to give, the parts of differences among them, as they are written."""
        parts = [(s,) if isinstance(s, str) else s.parts for s in self.sources]
        return tuple(dict.fromkeys(key for part in parts for key in part))

    def source_set(self, widths: Mapping[str, int]) -> SourceSet:
        """The run's sources, differences included; `widths` by key, as in `harvested_keys`."""
        found = {key: Source.parse(key, width=width) for key, width in widths.items()}
        return SourceSet(
            found[s] if isinstance(s, str) else difference(*(found[key] for key in s.parts)) for s in self.sources
        )

    @property
    def k(self) -> int | None:
        """Active latents per row, where the nonlinearity fixes them."""
        return nonlinearities.active_per_row(self.nonlinearity.build())

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
            "losses": self.losses.model_copy(update={"aux": self.losses.aux.model_copy(update=missing)}),
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
        content = runfile.read(path)
        if isinstance(names := content.get("dictionaries"), dict):
            raise ConfigError(
                f"expected one dictionary in {path}; it holds {', '.join(map(str, names))}.",
                hint="`crosscoder train` takes them all; in Python, training.several.load and train_together.",
            )
        raw = runfile.override(content, overrides, schema=cls)
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
