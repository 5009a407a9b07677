"""How specific a latent is to one of two sources, in [0, 1]: 0 where both have it alike, 1 where one side has it alone.

For side b (for side a with a and b exchanged):

    norm      relative_norm                       of decoder norms (`classes`): ½ where both norms are equal
    scaling   1 − max(|ν_error|, |ν_reconstruction|)   of latent scaling along the latent's own direction at b
    joint     min(2 norm − 1, scaling)            both at once; the first is stretched so that equal is 0 for either

`norm` alone is fooled by shrinkage and decoupling, and null pairs reach extremes of it that no real pair does;
`scaling` is what latents are called specific by (`survivors`), `joint` asks for both. All are cut to [0, 1]. NaN:
latents that have no part in the comparison, since they are active on fewer than `min_active` rows, or since the
wiring fixed their norms. A latent whose ν is undefined, or whose own direction explains little at its own side
(β_error below `LEAST_BETA`), is not specific to it: scaling is 0. A ν below 0 counts by its size: the opposite of a
concept is no lack of its direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoder.analysis.calibrated import Score, SideName
from crosscoder.analysis.classes import LatentClasses
from crosscoder.analysis.latent_scaling import LEAST_BETA, LatentScaling
from crosscoder.analysis.tables import read_table, write_table
from crosscoder.errors import FileFormatError

SCORES: tuple[Score, ...] = ("norm", "scaling", "joint")
SIDES: tuple[SideName, ...] = ("a", "b")
MIN_ACTIVE = 10
_THING = "specificity"


@dataclass(frozen=True)
class Specificity:
    """Scores of every latent for the sources `a` and `b`, by (score, side); `reason`: why there is none but `norm`.

    `relative_norm` is as it is, `live` says which latents have a part.
    """

    a: str
    b: str
    num_active: Int[Tensor, "latents"]
    live: Bool[Tensor, "latents"]
    relative_norm: Float[Tensor, "latents"]
    scores: dict[tuple[str, str], Float[Tensor, "latents"]]
    reason: str | None = None

    def score(self, name: str, side: str) -> Float[Tensor, "latents"]:
        """One score for one side; NaN for latents without a part."""
        return self.scores[name, side]

    @property
    def names(self) -> tuple[Score, ...]:
        """The scores that there are."""
        return tuple(name for name in SCORES if (name, "a") in self.scores)

    @property
    def live_norms(self) -> Float[Tensor, "_"]:
        """Relative norms of the latents that have a part."""
        return self.relative_norm[self.live]

    def table(self) -> pa.Table:
        """One row per latent."""
        columns = {
            "latent": pa.array(range(len(self.live)), pa.int32()),
            "num_active": pa.array(self.num_active.numpy()),
            "live": pa.array(self.live.numpy()),
            "relative_norm": pa.array(self.relative_norm.numpy(), from_pandas=True),
        }
        columns |= {f"{name}/{side}": pa.array(s.numpy(), from_pandas=True) for (name, side), s in self.scores.items()}
        said = {"a": self.a, "b": self.b} | ({} if self.reason is None else {"reason": self.reason})
        return pa.table(columns).replace_schema_metadata(said)

    def save(self, path: Path, *, fingerprint: str) -> None:
        """Write the table, with the fingerprint of the run that it is of."""
        table = self.table()
        said = {**(table.schema.metadata or {}), b"fingerprint": fingerprint.encode()}
        write_table(path, table.replace_schema_metadata(said), thing=_THING)

    @classmethod
    def load(cls, path: Path, *, fingerprint: str) -> Specificity | None:
        """What `save` wrote; None where there is no file, or it is of another fingerprint."""
        if not path.is_file():
            return None
        table = read_table(path, thing=_THING)
        said = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if said.get("fingerprint") != fingerprint:
            return None
        columns = [tuple(name.split("/")) for name in table.column_names if "/" in name]
        missing = {"live", "num_active", "relative_norm"} - set(table.column_names)
        if missing or any(len(pair) != 2 for pair in columns):
            raise FileFormatError(f"{path} does not hold specificities.", hint="Remove it; it is made again.")
        return cls(
            a=said["a"],
            b=said["b"],
            num_active=_tensor(table["num_active"]).long(),
            live=_tensor(table["live"]).bool(),
            relative_norm=_tensor(table["relative_norm"]),
            scores={(pair[0], pair[1]): _tensor(table["/".join(pair)]) for pair in columns},
            reason=said.get("reason"),
        )


def specificity(
    classes: LatentClasses, toward_a: LatentScaling, toward_b: LatentScaling, *, min_active: int = MIN_ACTIVE
) -> Specificity:
    """The scores from norms, and from scaling along a's rows (`toward_a`, the pair (b, a)) and along b's."""
    live = (toward_b.num_active >= min_active) & ~classes.by_wiring.cpu()
    live &= classes.relative_norm.isfinite().cpu()
    norm_b = classes.relative_norm.detach().double().cpu()
    scores: dict[tuple[str, str], Tensor] = {("norm", "a"): 1 - norm_b, ("norm", "b"): norm_b}
    reason = toward_b.reason or toward_a.reason
    if reason is None:
        for side, scaled in (("a", toward_a), ("b", toward_b)):
            scores["scaling", side] = scaling_specificity(scaled)
            scores["joint", side] = torch.minimum(2 * scores["norm", side] - 1, scores["scaling", side])
    return Specificity(
        a=classes.a,
        b=classes.b,
        num_active=toward_b.num_active,
        live=live,
        relative_norm=norm_b,
        scores={key: values.clamp(0, 1).masked_fill(~live, torch.nan) for key, values in scores.items()},
        reason=reason,
    )


def scaling_specificity(scaled: LatentScaling) -> Float[Tensor, "latents"]:
    """`1 − max(|ν_error|, |ν_reconstruction|)` for the side whose directions it is of, not yet cut; 0 if undefined."""
    ratio = torch.maximum(scaled.nu_error.abs(), scaled.nu_reconstruction.abs())
    defined = ratio.isfinite() & (scaled.beta_error_b >= LEAST_BETA) & (scaled.beta_reconstruction_b > 0)
    return torch.where(defined, 1 - ratio, 0.0)


def _tensor(column: pa.ChunkedArray) -> Tensor:
    values = column.to_numpy()
    return torch.from_numpy(np.array(values, dtype=np.float64))
