"""`convert`: a crosscoder of another tool as one of ours, with all that was assumed on the way said and saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError
from crosscoder.interop import ckkissane, dictionary_learning
from crosscoder.interop.foreign_files import Origin, locate
from crosscoder.interop.layouts import Found, Layout, find
from crosscoder.interop.naming import ModelPaths, name_models, name_sites, name_sources, order_scales
from crosscoder.interop.weights import ForeignWeights, Remarks, build
from crosscoder.progress import Progress, silent
from crosscoder.sources import SourceSet

log = logging.getLogger(__name__)
_STEPS = 2


@dataclass(frozen=True)
class Conversion:
    """A converted crosscoder; what was taken for granted, and what in the files contradicted itself."""

    crosscoder: Crosscoder
    layout: Layout
    weights: Path
    assumed: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All but the crosscoder's tensors."""
        cc = self.crosscoder
        return {
            "layout": self.layout,
            "weights": str(self.weights),
            "num_latents": cc.num_latents,
            "nonlinearity": repr(cc.nonlinearity),
            "sources": list(cc.sources.keys),
            "assumed": list(self.assumed),
            "warnings": list(self.warnings),
        }


def convert(
    source: str | Path,
    *,
    layout: Layout | Literal["auto"] = "auto",
    models: Mapping[str, str | None] | Sequence[str] | None = None,
    sites: str | Sequence[str] | None = None,
    scales: Mapping[str, float] | Sequence[float] | None = None,
    uncalibrated: bool = False,
    revision: str | None = None,
    progress: Progress = silent,
) -> Conversion:
    """The crosscoder in foreign files at a path or Hub id (`owner/name`, `owner/name/folder`).

    `models` are aliases in the order of the file's sources, with Hugging Face paths where given; `sites` their sites;
    `scales` what activations were multiplied by, for layouts that do not store it. `uncalibrated` takes a BatchTopK
    whose threshold was never set; it is to be calibrated then. Raises FileFormatError, ConfigError, SourceMismatch or
    NotCalibrated; nothing is guessed that changes a code.
    """
    progress("reading the weights", 0, _STEPS)
    origin = locate(source, revision=revision)
    found = find(origin.path, layout=layout)
    _check_scales_wanted(found, scales)
    remarks = Remarks()
    weights = _read(found, uncalibrated=uncalibrated, remarks=remarks)
    paths, sources = _named(found, origin, weights, models=models, sites=sites, remarks=remarks)
    if found.layout == "ckkissane":
        weights = replace(weights, scale=_scales(found, origin, order_scales(scales, sources), remarks))
    progress("building the crosscoder", 1, _STEPS)
    crosscoder = build(weights, sources)
    crosscoder.provenance = _provenance(found, origin, paths, remarks)
    for warning in remarks.warnings:
        log.warning("%s: %s", found.weights.name, warning)
    progress("building the crosscoder", _STEPS, _STEPS)
    return Conversion(crosscoder, found.layout, found.weights, tuple(remarks.assumed), tuple(remarks.warnings))


def _read(found: Found, *, uncalibrated: bool, remarks: Remarks) -> ForeignWeights:
    origin = str(found.weights)
    if found.layout == "ckkissane":
        return ckkissane.read(found.tensors, origin=origin)
    return dictionary_learning.read(
        found.tensors, found.settings, uncalibrated=uncalibrated, origin=origin, remarks=remarks
    )


def _check_scales_wanted(found: Found, scales: object) -> None:
    if scales is not None and found.layout != "ckkissane":
        raise ConfigError(
            f"scales are for files that do not store them; the layout {found.layout} has its own normaliser.",
            hint="Leave scales out.",
        )


def _named(
    found: Found,
    origin: Origin,
    weights: ForeignWeights,
    *,
    models: Mapping[str, str | None] | Sequence[str] | None,
    sites: str | Sequence[str] | None,
    remarks: Remarks,
) -> tuple[ModelPaths, SourceSet]:
    """Paths of the models by alias, and the sources of the file."""
    num_sources, width = weights.bias.shape
    kissane = found.layout == "ckkissane"
    folder = found.weights.parent.name
    default = ckkissane.site_of(found.settings, folder) if kissane else dictionary_learning.layer_of(found.settings)
    places = name_sites(sites, default=default, remarks=remarks)
    published = ckkissane.PUBLISHED_MODELS.get(origin.repository or "") if kissane else None
    if models is None and published:
        models = dict(published)
        remarks.assumed.append(f"models {', '.join(published.values())}: known for {origin.repository}")
    paths = name_models(models, num_sources=num_sources, num_sites=len(places), remarks=remarks)
    return paths, name_sources(list(paths), places, width=width, num_sources=num_sources)


def _scales(found: Found, origin: Origin, given: tuple[float, ...] | None, remarks: Remarks) -> Tensor:
    num_sources = found.tensors["b_dec"].shape[0]
    scales = ckkissane.find_scales(
        found.settings, given=given, repository=origin.repository, num_sources=num_sources, remarks=remarks
    )
    return torch.tensor(scales)


def _provenance(found: Found, origin: Origin, models: ModelPaths, remarks: Remarks) -> dict[str, Any]:
    """Where it is from, for `config.json`: files, settings that are numbers or names, and what was assumed."""
    plain = {name: value for name, value in found.settings.items() if isinstance(value, str | int | float | bool)}
    return {
        "models": {alias: {"path": path} for alias, path in models.items()},
        "converted": {
            "layout": found.layout,
            "origin": origin.name,
            "commit": origin.commit,
            "weights": found.weights.name,
            "assumed": remarks.assumed,
            "warnings": remarks.warnings,
            "settings": {name: value for name, value in plain.items() if "wandb" not in name},
        },
    }
