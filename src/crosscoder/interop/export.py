"""`export`: a crosscoder of ours in the layout of another tool, which then computes the same codes and reconstructions.

    dictionary_learning   ReLU, and BatchTopK with the code norms sum, concat and none; its normaliser is stored.
                          Its decoder divides by g + 1e-8, so ours is multiplied by (g + 1e-8) / g first.
    ckkissane             ReLU only. It multiplies by scales alone, so means move into the biases, exactly:
                          b_enc ← b_enc − Σ_s W_enc[s] c_s μ_s      b_dec ← b_dec + c_s μ_s

Neither stores names of sources, groups, or which latent cannot write where (zeros stand for that); it is said. What a
layout cannot compute is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscoder import files
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError
from crosscoder.interop import export_ckkissane, export_dictionary_learning
from crosscoder.interop.dense import Dense, dense
from crosscoder.interop.layouts import Layout

_WRITERS = {"ckkissane": export_ckkissane.write, "dictionary_learning": export_dictionary_learning.write}


@dataclass(frozen=True)
class Export:
    """Where an exported crosscoder lies, and what its layout does not say."""

    path: Path
    layout: Layout
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"out": str(self.path), "layout": self.layout, "remarks": list(self.remarks)}


def export(crosscoder: Crosscoder, path: str | Path, *, layout: Layout) -> Export:
    """Write `crosscoder` into a new directory `path` in another tool's layout, whole or not at all.

    Raises FileFormatError for what the layout cannot compute, NotCalibrated for BatchTopK without a threshold.
    """
    path = Path(path)
    _refuse_existing(path)
    weights, write = dense(crosscoder), _WRITERS[layout]
    with files.replacing(path) as draft:
        draft.mkdir(parents=True)
        remarks = write(crosscoder, weights, draft)
    return Export(path, layout, tuple([*_not_said(crosscoder, weights), *remarks]))


def _refuse_existing(path: Path) -> None:
    """Raises FileFormatError when there is something at `path`, which would be lost."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileFormatError(
            f"{path} is there already, and an export would replace it.", hint="Give a directory that is not there yet."
        )


def _not_said(crosscoder: Crosscoder, weights: Dense) -> list[str]:
    said = [f"names are not stored; sources are, in order: {', '.join(crosscoder.sources.keys)}"]
    if len(crosscoder.wiring.groups) > 1:
        said.append(f"groups are not stored; latents follow one another: {_ranges(crosscoder)}")
    if weights.has_zeros:
        said.append("where a latent cannot read or write there are zeros, which training there would fill")
    return said


def _ranges(crosscoder: Crosscoder) -> str:
    pairs = zip(crosscoder.wiring, crosscoder.wiring.latent_ranges, strict=True)
    return ", ".join(f"{group.name} {first}–{last - 1}" for group, (first, last) in pairs)
