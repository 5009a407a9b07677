"""Names for the sources of foreign files, which have none: models and sites, as the user says or by convention.

Sources of a file are numbered. With models m_0 … and sites t_0 … they are called m_0/t_0, m_0/t_1, …, m_1/t_0, …:
the sites of the first model, then those of the second. By convention of both tools 0 is the base model, 1 the chat
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.interop.weights import Remarks
from crosscoder.sources import Source, SourceSet

CONVENTION = ("base", "chat")
ModelPaths = dict[str, str | None]


def name_models(
    models: Mapping[str, str | None] | Sequence[str] | None, *, num_sources: int, num_sites: int, remarks: Remarks
) -> ModelPaths:
    """Alias and Hugging Face path of every model, in the order of the file's sources."""
    if isinstance(models, str):
        return {models: None}
    if models is not None:
        return dict(models) if isinstance(models, Mapping) else dict.fromkeys(models)
    if num_sources == num_sites:
        remarks.assumed.append("one model, called base")
        return {"base": None}
    if num_sources == len(CONVENTION) * num_sites:
        remarks.assumed.append("the first source is the base model, the second the chat model: convention, not stored")
        return dict.fromkeys(CONVENTION)
    raise ConfigError(
        f"the file has {num_sources} sources and does not name them.",
        details=["expected  models (and sites) that make as many"],
        hint="Name them: --models base,chat --site layers.3.resid_post,layers.4.resid_post.",
    )


def name_sites(sites: str | Sequence[str] | None, *, default: str | None, remarks: Remarks) -> tuple[str, ...]:
    """The sites, as given or as the file's settings say."""
    if sites is not None:
        return (sites,) if isinstance(sites, str) else tuple(sites)
    if default is None:
        raise ConfigError(
            "neither the weights nor the settings beside them say where in the models the activations are from.",
            hint="Say it: --site layers.13.resid_post (sites=...).",
        )
    remarks.assumed.append(f"site {default}: as the settings beside the weights say, in the tool's convention")
    return (default,)


def name_sources(models: Sequence[str], sites: Sequence[str], *, width: int, num_sources: int) -> SourceSet:
    """All sites of the first model, then of the next; raises SourceMismatch unless that makes `num_sources`."""
    sources = [Source(model, site, width) for model in models for site in sites]
    if len(sources) != num_sources:
        raise SourceMismatch(
            f"the file has {num_sources} sources; {len(models)} models × {len(sites)} sites make {len(sources)}.",
            details=[source.key for source in sources],
            hint="Name as many models (--models) and sites (--site) as the file has, in its order.",
        )
    return SourceSet(sources)


def order_scales(scales: Mapping[str, float] | Sequence[float] | None, sources: SourceSet) -> tuple[float, ...] | None:
    """One positive scale per source, in order; a mapping is by source or by model."""
    if scales is None:
        return None
    if isinstance(scales, Mapping):
        names = [source.key if source.key in scales else source.model for source in sources]
        missing = [f"missing  {name}" for name in names if name not in scales]
        extra = [f"unknown  {name}" for name in scales if name not in names]
        values = [] if missing or extra else [float(scales[name]) for name in names]
    else:
        missing, extra, values = [], [], [float(value) for value in scales]
    if len(values) != len(sources) or not all(0 < value < float("inf") for value in values):
        raise ConfigError(
            f"expected one positive scale for each of {len(sources)} sources; got {scales}.",
            details=[*missing, *extra, *sources.describe()],
            hint="Give them by model, base=0.28,chat=0.24, or in the order of the sources.",
        )
    return tuple(values)
