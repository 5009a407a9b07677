"""Controls that are trained: what their directories say of them, and the specificities of their latents.

controls/<name>/control.json          what it is a control of, and how well it reads its sources
controls/<name>/specificity/*.parquet its latents' specificities on its own analysis set, by pair
specificity/*.parquet                 those of the run itself
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crosscoder import files
from crosscoder.analysis.classes import latent_classes
from crosscoder.analysis.control_plan import OF_THE_PAIR, identity_of
from crosscoder.analysis.latent_scaling import scaling
from crosscoder.analysis.opened_run import OpenedRun
from crosscoder.analysis.pair_controls import CONTROLS
from crosscoder.analysis.passes import watch
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.analysis.specificity import Specificity, specificity
from crosscoder.training.json_numbers import json_values

RECORD = "control.json"
_THING = "control"


@dataclass(frozen=True)
class FinishedControl:
    """A trained control, as its `control.json` says; `path` is its run directory.

    `of` identifies the run that it is a control of, `a` and `b` the pair, where it belongs to one.
    """

    path: Path
    kind: str
    about: str
    seed: int
    of: str
    a: str | None
    b: str | None
    overrides: tuple[str, ...]
    num_latents: int
    num_rows: int
    fve: float
    l0: float
    dead_fraction: float

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    def save(self) -> None:
        """Write `control.json`."""
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        files.write_json(self.path / RECORD, json_values({"format": f"crosscoder.{_THING}/1"} | content))

    @classmethod
    def load(cls, path: Path) -> FinishedControl:
        """The control in the directory `path`."""
        content: dict[str, Any] = files.read_json(path / RECORD, thing=_THING)
        del content["format"]
        content["overrides"] = tuple(content["overrides"])
        return cls(path=path, **content)


def finished(run: OpenedRun, *, a: str, b: str) -> tuple[FinishedControl, ...]:
    """All trained controls of this configuration that say something of the pair, by name."""
    places = sorted((run.out / CONTROLS).glob(f"*/{RECORD}"))
    found = [FinishedControl.load(place.parent) for place in places]
    identity = identity_of(run.config)
    return tuple(
        control
        for control in found
        if control.of == identity and (control.kind not in OF_THE_PAIR or (control.a, control.b) == (a, b))
    )


def pair_specificity(run: OpenedRun, *, a: str, b: str) -> Specificity:
    """The specificities of a run's latents on its analysis set: those at hand, or measured now and kept."""
    path = run.out / "specificity" / f"{a}--{b}.parquet".replace("/", ".")
    there = Specificity.load(path, fingerprint=run.fingerprint)
    if there is not None:
        return there
    cc = run.crosscoder
    sums = ScalingSums(cc, [(a, b), (b, a)], bootstrap=None)
    num_rows = int(run.text.kept.sum())
    watch(cc, run.activations(), reconstructions=[sums], num_rows=num_rows, progress=run.progress)
    ancestry = run.ancestry(a, b)
    toward_a, toward_b = (scaling(sums, a=one, b=two, ancestry=ancestry) for one, two in ((b, a), (a, b)))
    found = specificity(latent_classes(cc, a=a, b=b), toward_a, toward_b)
    found.save(path, fingerprint=run.fingerprint)
    return found
