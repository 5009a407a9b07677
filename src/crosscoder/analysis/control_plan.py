"""Which controls of a run there are to train, as ordinary runs: what each one keeps of the run, and what it changes.

    null-<a>--<b>-<n>      x_b := x_a + noise of the true difference's size; init, order of text and noise from seed n
    identical-<a>--<b>     x_b := x_a
    partner-<alias>-<name> the same run with another model under that alias
    repeat-<n>             the same run with another seed
    difference-<a>--<b>    an SAE of the source x_b − x_a     } at equal compute
    sae-<alias>            an SAE of one source               }

Equal compute: the same rows, and as many weights. A crosscoder spends, per row, its latents times the widths that they
read and write. What it spends at a and b is given to the difference SAE as latents, and what it spends at one source to
the SAE of that source: an acausal crosscoder of n latents and two equal widths is matched by a difference SAE of 2n
latents, and by two SAEs of n latents each. k is the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128_hexdigest

from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.capture.models import ModelConfig
from crosscoder.capture.null_pair import pair_of
from crosscoder.errors import ConfigError
from crosscoder.sources import SourceSet
from crosscoder.training import runfile
from crosscoder.training.config import DifferenceConfig, RunConfig, SaeConfig, TrainConfig
from crosscoder.training.directory import RunDirectory
from crosscoder.training.null_pairs import IdenticalNull, StructurelessNull
from crosscoder.wiring import Wiring

Kind = Literal["null", "identical", "partner", "repeat", "difference", "sae"]
OF_THE_PAIR = ("null", "identical", "difference")
"""Kinds that belong to one pair of sources; the others serve every pair of the run."""
COMPARED = ("null", "identical", "partner", "repeat")
"""Kinds whose crosscoders have both sources of the pair."""
DEFAULT_SEEDS = 3


@dataclass(frozen=True)
class WantedControls:
    """What to train: `seeds` counts null pairs and repeats; `partners` maps an alias to another model's path or id.

    `overrides` are `key.path=value` for the run files of all of them.
    """

    kinds: tuple[Literal["null", "identical", "repeat", "baselines"], ...] = ("null",)
    seeds: int = DEFAULT_SEEDS
    partners: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """One control: an ordinary run, and what it is."""

    kind: Kind
    about: str
    seed: int
    run: RunConfig

    @property
    def path(self) -> Path:
        """Its run directory."""
        assert self.run.out is not None, "every control has a directory"
        return Path(self.run.out)

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether it is trained already."""
        return RunDirectory(self.path).finished

    def to_json(self) -> dict[str, Any]:
        """What a list of planned controls says of it."""
        rows = self.run.train.num_tokens
        return {"name": self.name, "about": self.about, "num_rows": rows, "finished": self.finished}


def planned(run: OpenedRun, wanted: WantedControls, *, a: str, b: str) -> tuple[Control, ...]:
    """All controls that are wanted for the pair of source keys (a, b), finished ones among them.

    Raises ConfigError, UnknownKey, UnknownSource or SourceMismatch for what cannot be.
    """
    if wanted.seeds < 1:
        raise ConfigError(f"expected at least one seed; got {wanted.seeds}.", hint="Give --seeds 3, or more.")
    if run.made_up:
        raise ConfigError(
            "this run is a control itself: one of its sources is made up.", hint="Name the run that it is a control of."
        )
    found = list(_Planner(run, a, b, wanted.overrides).controls(wanted))
    if not found:
        raise ConfigError(
            "no control was asked for.", hint="Name some: --null, --identical, --partner, --repeat, --baselines."
        )
    return tuple(found)


def identity_of(config: RunConfig) -> str:
    """A hash of a run's configuration, its place and all defaults left out: which run a control is of."""
    content = config.model_dump(mode="json", exclude={"out"}, exclude_defaults=True)
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def equal_latents(wiring: Wiring, keys: Sequence[str], *, width: int) -> int:
    """Latents of an autoencoder of one source of that width with as many weights as `wiring` has at sources `keys`."""
    widths = {key: wiring.sources[key].width for key in keys}
    weights = sum(
        group.num_latents * widths[key] * ((key in group.reads) + (key in group.writes))
        for group in wiring
        for key in keys
    )
    return max(1, weights // (2 * width))


def short(sources: SourceSet, key: str) -> str:
    """A source's name as part of a path: the model's alias where that says it all."""
    source = sources[key]
    alone = sum(other.model == source.model for other in sources) == 1
    return source.model if alone else key.replace("/", ".")


@dataclass(frozen=True)
class _Planner:
    opened: OpenedRun
    a: str
    b: str
    overrides: tuple[str, ...]

    def controls(self, wanted: WantedControls) -> Iterator[Control]:
        seeds = range(1, wanted.seeds + 1)
        if "null" in wanted.kinds:
            yield from map(self.null, seeds)
        if "identical" in wanted.kinds:
            yield self.identical()
        yield from (self.partner(alias, path) for alias, path in wanted.partners.items())
        if "repeat" in wanted.kinds:
            yield from map(self.repeat, seeds)
        if "baselines" in wanted.kinds:
            yield from self.baselines()

    @property
    def config(self) -> RunConfig:
        return self.opened.config

    @property
    def sources(self) -> SourceSet:
        return self.opened.crosscoder.sources

    def null(self, seed: int) -> Control:
        pair_of(self.sources.underlying, a=self.a, b=self.b)
        pair = StructurelessNull(a=self.a, b=self.b, seed=seed)
        changes = {"seed": self.config.seed + seed, "activations": self._activations(pair)}
        return self._control(
            "null", f"null-{self._pair}-{seed}", f"{self._b} is {self._a} and noise", changes, seed=seed
        )

    def identical(self) -> Control:
        pair_of(self.sources.underlying, a=self.a, b=self.b)
        pair = IdenticalNull(a=self.a, b=self.b)
        changes = {"activations": self._activations(pair)}
        return self._control("identical", f"identical-{self._pair}", f"{self._b} is {self._a}", changes)

    def partner(self, alias: str, path: str) -> Control:
        there = self.config.models
        if alias not in there:
            raise ConfigError(
                f"no model of this run is called {alias!r}, so that none can take its place.",
                details=list(there),
                hint="Name one of these: --partner ALIAS=PATH.",
            )
        model = ModelConfig(path=path, dtype=there[alias].dtype, device=there[alias].device)
        called = Path(path).name if Path(path).exists() else path.replace("/", ".")
        changes = {"models": {**there, alias: model}}
        return self._control("partner", f"partner-{alias}-{called}", f"{alias} is {called}", changes)

    def repeat(self, seed: int) -> Control:
        changes = {"seed": self.config.seed + seed}
        return self._control("repeat", f"repeat-{seed}", f"seed {self.config.seed + seed}", changes, seed=seed)

    def baselines(self) -> Iterator[Control]:
        a, b = self.sources[self.a], self.sources[self.b]
        alike = a.width == b.width and a.site == b.site and self.config.text.alignment == "identical"
        if alike and a.difference is b.difference is None:
            yield self._autoencoder(
                "difference",
                f"difference-{self._pair}",
                DifferenceConfig(difference=(b.model, a.model), site=a.site),
                equal_latents(self.opened.crosscoder.wiring, [a.key, b.key], width=a.width),
            )
        aligned = self.config.text.alignment == "bytes"  # the text's own tokenizer must then have a source
        for source in (a, b):
            if aligned and source.model != self.config.text.tokenizer:
                continue
            number = equal_latents(self.opened.crosscoder.wiring, [source.key], width=source.width)
            yield self._autoencoder("sae", f"sae-{short(self.sources, source.key)}", source.key, number)

    def _autoencoder(self, kind: Kind, name: str, source: str | DifferenceConfig, num_latents: int) -> Control:
        config = self.config
        changes = {
            "sources": (source,),
            "wiring": SaeConfig(num_latents=num_latents),
            "losses": config.losses.model_copy(update={"delta": None, "source_dropout": 0.0}),
            "init": config.init.model_copy(update={"warm_start": None}),
        }
        what = f"{self._b} − {self._a}" if kind == "difference" else str(source)
        return self._control(kind, name, f"SAE of {what}, {num_latents:,} latents: equal compute", changes)

    @property
    def _pair(self) -> str:
        return f"{self._a}--{self._b}"

    @property
    def _a(self) -> str:
        return short(self.sources, self.a)

    @property
    def _b(self) -> str:
        return short(self.sources, self.b)

    def _activations(self, pair: StructurelessNull | IdenticalNull) -> object:
        return self.config.activations.model_copy(update={"null_pair": pair})

    def _control(self, kind: Kind, name: str, about: str, changes: Mapping[str, object], *, seed: int = 0) -> Control:
        place = {"out": str(self.opened.out / "controls" / name)}
        changed = self.config.model_copy(update={**changes, **place}).model_dump(mode="json")
        raw = runfile.override(changed, [*_derived_anew(self.overrides), *self.overrides], schema=RunConfig)
        return Control(kind, about, seed, runfile.validate(RunConfig, raw, name=f"the control {name}"))


def _derived_anew(overrides: Sequence[str]) -> Iterator[str]:
    """Settings that follow from the length of a run follow from the new one, where that is overridden."""
    changed = {text.partition("=")[0] for text in overrides}
    if changed & {"train.num_tokens", "train.batch_size"}:
        yield from (f"train.{key}=null" for key in TrainConfig.DERIVED if key != "k_start")
        yield "losses.aux.dead_after_tokens=null"
