"""Whether models at hand are those that a crosscoder was trained on.

Weights are compared by their hash (`fingerprints`), and only between models that are held in one dtype: rounding
changes every weight. What a file does not record cannot be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from crosscoder.capture.models import StudiedModel
from crosscoder.errors import ModelMismatch

_log = logging.getLogger(__name__)


def check_recorded(models: Mapping[str, StudiedModel], provenance: Mapping[str, Any]) -> None:
    """Raises ModelMismatch where a model's weights or vocabulary are not those in a crosscoder's `provenance`.

    A model that is held in another dtype, or of which nothing is recorded, is named in a log line instead.
    """
    recorded = provenance.get("models")
    known: Mapping[str, Any] = recorded if isinstance(recorded, dict) else {}
    for alias, model in models.items():
        there = known.get(alias)
        if not isinstance(there, dict) or not there.get("weights"):
            _log.warning("nothing is recorded of the weights of %s, so that they were not compared.", alias)
            continue
        _compare(alias, model.identity, there)


def _compare(alias: str, mine: Mapping[str, str | None], there: Mapping[str, Any]) -> None:
    alike = mine["dtype"] == there.get("dtype")
    if not alike:
        _log.warning(
            "%s is held in %s, and was in %s: its weights were not compared, and values differ by the rounding.",
            alias, mine["dtype"], there.get("dtype"),
        )  # fmt: skip
    compared = ["tokenizer", *(["weights"] if alike else [])]
    different = [name for name in compared if there.get(name) and mine[name] != there[name]]
    if different:
        raise ModelMismatch(
            f"the model {alias} is not the one that the crosscoder was trained on.",
            details=[
                f"{name}: recorded {there.get(name)}, found {mine[name]}" for name in ("path", "revision", *different)
            ],
            hint="Give the model as it was then: its path, revision and adapter are in the crosscoder's config.json.",
        )
