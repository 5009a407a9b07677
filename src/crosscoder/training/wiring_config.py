"""The `wiring:` block of a run file: a constructor of `wiring.py` by name, and its keywords.

A list of sources may name them in full, or all of a kind at once: `reads: mlp_in` is every source at an `mlp_in`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from crosscoder import wiring
from crosscoder.errors import WiringError
from crosscoder.sources import SITE_KINDS, SourceSet
from crosscoder.training.settings import Count, Settings
from crosscoder.wiring import Wiring

Some = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(strict=False)
]
Tied = Literal["decoder", "norm"]


def chosen(sources: SourceSet, names: Sequence[str]) -> SourceSet:
    """The sources that `names` mean: keys, aliases with one source, or kinds of site.

    Raises WiringError or UnknownSource for a name that means none.
    """
    keys: list[str] = []
    for name in names:
        kind = name in ("embed", *SITE_KINDS)
        found = [source.key for source in sources if source.site.rpartition(".")[2] == name] if kind else []
        if kind and not found:
            raise WiringError(
                f"no source of this run is at {name}.", details=sources.keys, hint="Name sources of the run."
            )
        keys += found or [sources.resolve(name).key]
    return sources.subset(keys)


class OverSources(Settings):
    """A wiring over all sources of the run, or over some of them."""

    sources: Some | None = Field(
        default=None, description="The sources it is over: names, or kinds of site; null: all of the run."
    )

    def of(self, sources: SourceSet) -> SourceSet:
        """Those of `sources` that the wiring is over."""
        return sources if self.sources is None else chosen(sources, self.sources)


class AcausalConfig(OverSources):
    """Every latent reads and writes every source."""

    kind: Literal["acausal"] = Field(default="acausal", description="Every latent reads and writes every source.")
    num_latents: Count = Field(description="Number of latents.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        return wiring.acausal(self.of(sources), num_latents=self.num_latents).over(sources)


class SaeConfig(Settings):
    """A sparse autoencoder of one source."""

    kind: Literal["sae"] = Field(default="sae", description="A sparse autoencoder of one source.")
    num_latents: Count = Field(description="Number of latents.")
    source: str | None = Field(
        default=None, description="The source it reads and writes; null: the only one of the run."
    )

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over the one source; raises WiringError when it is not named and there are several."""
        if self.source is None and len(sources) != 1:
            raise WiringError(f"wiring.source: expected one of {', '.join(sources.keys)}; it is missing")
        source = sources.resolve(self.source or sources.keys[0])
        return wiring.sae(source, num_latents=self.num_latents).over(sources)


class TranscoderConfig(Settings):
    """Latents that predict one source from another."""

    kind: Literal["transcoder"] = Field(default="transcoder", description="Predicts one source from another.")
    num_latents: Count = Field(description="Number of latents.")
    read: str = Field(description="The source it reads.")
    write: str = Field(description="The source it writes.")
    skip: bool = Field(default=False, description="Whether an affine map of the reads is added.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over the two sources."""
        read, write = sources.resolve(self.read), sources.resolve(self.write)
        return wiring.transcoder(read, write, num_latents=self.num_latents, skip=self.skip).over(sources)


class PerSourceConfig(OverSources):
    """Independent sparse autoencoders, one per source."""

    kind: Literal["per_source"] = Field(default="per_source", description="One autoencoder per source.")
    num_latents_per_source: Count = Field(description="Number of latents of each.")
    k: Count | None = Field(default=None, description="Active latents per row of each; null: they share k.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        of = self.of(sources)
        return wiring.per_source(of, num_latents_per_source=self.num_latents_per_source, k=self.k).over(sources)


class WeaklyCausalConfig(OverSources):
    """Latents of a layer write it and every later one."""

    kind: Literal["weakly_causal"] = Field(default="weakly_causal", description="Writes the own and later layers.")
    num_latents_per_layer: Count = Field(description="Number of latents of each layer.")
    reads: Literal["own", "prefix"] = Field(
        default="own", description="Whether they read their layer, or all up to it."
    )

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        of = self.of(sources)
        made = wiring.weakly_causal(of, num_latents_per_layer=self.num_latents_per_layer, reads=self.reads)
        return made.over(sources)


class StrictlyCausalConfig(Settings):
    """A cross-layer transcoder."""

    kind: Literal["strictly_causal"] = Field(default="strictly_causal", description="A cross-layer transcoder.")
    num_latents_per_layer: Count = Field(description="Number of latents of each layer.")
    reads: Some = Field(default=("mlp_in",), description="Sources that are read: names, or a kind of site.")
    writes: Some = Field(default=("mlp_out",), description="Sources that are written: names, or a kind of site.")
    tied: Tied | None = Field(default=None, description="One decoder, or one norm, for all targets of a latent.")
    skip: bool = Field(default=False, description="Whether each layer's own target gets an affine map of the reads.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        reads, writes = chosen(sources, self.reads), chosen(sources, self.writes)
        made = wiring.strictly_causal(
            reads, writes, num_latents_per_layer=self.num_latents_per_layer, tied=self.tied, skip=self.skip
        )
        return made.over(sources)


class MixedConfig(Settings):
    """A cross-layer transcoder for MLPs with a weakly causal crosscoder for attention outputs."""

    kind: Literal["mixed"] = Field(default="mixed", description="Strictly causal MLPs, weakly causal attention.")
    num_latents_per_layer: Count = Field(description="Number of latents of each layer and part.")
    reads: Some = Field(default=("mlp_in",), description="What MLP latents read: names, or a kind of site.")
    mlp_outs: Some = Field(default=("mlp_out",), description="What MLP latents write.")
    attn_outs: Some = Field(default=("attn_out",), description="What attention latents read and write.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        parts = [chosen(sources, names) for names in (self.reads, self.mlp_outs, self.attn_outs)]
        return wiring.mixed(*parts, num_latents_per_layer=self.num_latents_per_layer).over(sources)


class LocalConfig(OverSources):
    """Latents of a window of adjacent layers."""

    kind: Literal["local"] = Field(default="local", description="Reads and writes a window of layers.")
    num_latents_per_layer: Count = Field(description="Number of latents of each window.")
    window: Count = Field(description="Layers in a window.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        of = self.of(sources)
        made = wiring.local(of, num_latents_per_layer=self.num_latents_per_layer, window=self.window)
        return made.over(sources)


class PrePostMlpConfig(Settings):
    """Latents of the stream before an MLP that also write what the MLP adds."""

    kind: Literal["pre_post_mlp"] = Field(default="pre_post_mlp", description="Reads before an MLP, writes both sides.")
    num_latents: Count = Field(description="Number of latents.")
    resid_mid: str = Field(default="resid_mid", description="The stream before the MLP.")
    mlp_out: str = Field(default="mlp_out", description="What the MLP adds.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over the two sources; raises WiringError where a kind of site means more than one."""
        pair = [chosen(sources, [name]) for name in (self.resid_mid, self.mlp_out)]
        if any(len(found) != 1 for found in pair):
            raise WiringError("expected one source before the MLP and one after it.", details=sources.keys)
        made = wiring.pre_post_mlp(*(found.sources[0] for found in pair), num_latents=self.num_latents)
        return made.over(sources)


class DesignatedSharedConfig(OverSources):
    """Latents with tied decoders and a smaller penalty beside free ones."""

    kind: Literal["designated_shared"] = Field(default="designated_shared", description="Some latents are shared.")
    shared: Count = Field(description="Number of latents with tied decoders.")
    free: Count = Field(description="Number of free latents.")
    penalty: float = Field(
        default=0.1, gt=0, description="What multiplies the sparsity coefficient for the shared latents."
    )
    tied: Tied = Field(
        default="decoder", description="Whether shared latents have one decoder, or decoders of one norm."
    )
    k_shared: Count | None = Field(default=None, description="The shared latents' own k; null: all share k.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        options = self.model_dump(exclude={"kind", "sources"})
        return wiring.designated_shared(self.of(sources), **options).over(sources)


class DedicatedConfig(OverSources):
    """Latents of all sources beside latents that one model has to itself."""

    kind: Literal["dedicated"] = Field(default="dedicated", description="Some latents belong to one model.")
    shared: Count = Field(description="Number of latents of all sources.")
    exclusive: dict[str, Count] = Field(min_length=1, description="Alias of a model to its number of own latents.")
    k_exclusive: dict[str, Count] | None = Field(default=None, description="Alias to the own k of its latents.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        of = self.of(sources)
        made = wiring.dedicated(of, shared=self.shared, exclusive=self.exclusive, k_exclusive=self.k_exclusive)
        return made.over(sources)


_Constructors = (
    AcausalConfig
    | SaeConfig
    | TranscoderConfig
    | PerSourceConfig
    | WeaklyCausalConfig
    | StrictlyCausalConfig
    | MixedConfig
    | LocalConfig
    | PrePostMlpConfig
    | DesignatedSharedConfig
    | DedicatedConfig
)
OneWiring = Annotated[_Constructors, Field(discriminator="kind")]


class CombineConfig(Settings):
    """All groups of several wirings; each part's groups are called by its number first."""

    kind: Literal["combine"] = Field(default="combine", description="All groups of several wirings.")
    combine: Annotated[tuple[OneWiring, ...], Field(strict=False)] = Field(min_length=1, description="The wirings.")

    def build(self, sources: SourceSet) -> Wiring:
        """The wiring over `sources`."""
        parts = [part.build(sources).prefixed(str(i)) for i, part in enumerate(self.combine)]
        return wiring.combine(*parts).over(sources)


def _combines(value: Any) -> Any:
    """`{combine: [...]}` is of the kind combine."""
    return {"kind": "combine", **value} if isinstance(value, dict) and "combine" in value else value


WiringConfig = Annotated[_Constructors | CombineConfig, Field(discriminator="kind"), BeforeValidator(_combines)]
