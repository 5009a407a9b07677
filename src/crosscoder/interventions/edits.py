"""Edits of latents, as frozen descriptions.

On a token that is selected, with `f_j` the raw value of latent j (0 where it is not active),

    ablate   f'_j = 0          scale   f'_j = v f_j
    clamp    f'_j = v          add     f'_j = f_j + v

and at every source s that is edited

    x_s' = x_s + Σ_j (f'_j − f_j) d_j^s          d_j^s: the decoder row in raw space

so that whatever the crosscoder does not reconstruct stays as it is: a zero edit changes nothing, and ablating all
latents replaces the reconstruction by the decoder's bias. Several edits follow one another. `f'_j` may be below 0 where
a negative amount is added: the direction is then taken away.
Source: Lindsey et al. 2024 and Minder et al. 2025 (steering by decoder vectors). Deviation: no renormalisation of x_s',
and values in f, not in multiples of the norm; `steering.doses` gives multiples of a latent's largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, UnknownLatent
from crosscoder.interventions.selections import AllTokens, TokenSelection
from crosscoder.sources import Source

Kind = Literal["ablate", "clamp", "scale", "add"]


@dataclass(frozen=True)
class Edit:
    """What happens to some latents, on which tokens, and at which sources.

    `values` has one number, or one for every latent. `sources` are keys, or aliases of models; None is every source
    that the crosscoder writes.
    """

    kind: Kind
    latents: tuple[int, ...]
    values: tuple[float, ...] = (0.0,)
    tokens: TokenSelection = field(default_factory=AllTokens)
    sources: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.latents:
            raise UnknownLatent("expected at least one latent to edit; got none.", hint="Name latents by number.")
        if len(set(self.latents)) < len(self.latents):
            raise EditError("expected every latent once in an edit.", details=[f"latents {list(self.latents)}"])
        if len(self.values) not in (1, len(self.latents)):
            raise EditError(
                f"expected one value, or one for each of {len(self.latents)} latents; got {len(self.values)}."
            )
        if not all(map(isfinite, self.values)):
            raise EditError(
                "expected finite values in an edit.",
                details=[f"values {list(self.values[:10])}"],
                hint="NaN or infinity would make every later activation NaN.",
            )

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing, whatever the values are."""
        neutral = {"add": 0.0, "scale": 1.0}.get(self.kind)
        return all(value == neutral for value in self.values)

    @property
    def reads_code(self) -> bool:
        """Whether the change depends on the latents' values."""
        return self.kind != "add"

    def applied(self, f: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """`f'` of the values of the edit's latents."""
        values = torch.tensor(self.values, dtype=f.dtype, device=f.device).expand(f.shape)
        match self.kind:
            case "ablate":
                return torch.zeros_like(f)
            case "clamp":
                return values
            case "scale":
                return values * f
            case "add":
                return f + values

    def edited_sources(self, crosscoder: Crosscoder) -> list[Source]:
        """The sources that it changes; raises EditError for one that cannot be written, or where none is.

        Differences are not among them: no model has them.
        """
        check_latents(crosscoder, self.latents)
        written = [source for source in crosscoder.writes if source.difference is None]
        chosen = written if self.sources is None else _named(crosscoder, written, self.sources)
        latents = list(self.latents)
        columns = [crosscoder.writes.index(source.key) for source in chosen]
        can = [bool(crosscoder.wiring.writes_mask[latents, column].any()) for column in columns]
        silent = [source.key for source, writes in zip(chosen, can, strict=True) if not writes]
        if not any(can) or (self.sources is not None and silent):
            raise EditError(
                "none of the edited latents writes the sources to be edited.",
                details=[f"latents  {latents[:10]}", *(f"source   {key}" for key in silent)],
                hint="Choose other latents, or sources that they write.",
            )
        return [source for source, writes in zip(chosen, can, strict=True) if writes]


def ablate(
    latents: Sequence[int], *, tokens: TokenSelection | None = None, sources: Sequence[str] | None = None
) -> Edit:
    """Sets latents to 0."""
    return _edit("ablate", latents, 0.0, tokens, sources)


def clamp(
    latents: Sequence[int],
    values: float | Sequence[float],
    *,
    tokens: TokenSelection | None = None,
    sources: Sequence[str] | None = None,
) -> Edit:
    """Sets latents to a value, also where they are not active."""
    return _edit("clamp", latents, values, tokens, sources)


def scale(
    latents: Sequence[int],
    factors: float | Sequence[float],
    *,
    tokens: TokenSelection | None = None,
    sources: Sequence[str] | None = None,
) -> Edit:
    """Multiplies latents by a factor: nothing happens where they are not active."""
    return _edit("scale", latents, factors, tokens, sources)


def add(
    latents: Sequence[int],
    values: float | Sequence[float],
    *,
    tokens: TokenSelection | None = None,
    sources: Sequence[str] | None = None,
) -> Edit:
    """Adds a value to latents, whether they are active or not."""
    return _edit("add", latents, values, tokens, sources)


def check_latents(crosscoder: Crosscoder, latents: Sequence[int]) -> None:
    """Raises UnknownLatent for a number that no latent has."""
    outside = [latent for latent in latents if not 0 <= latent < crosscoder.num_latents]
    if outside:
        raise UnknownLatent(
            f"this crosscoder has latents 0 to {crosscoder.num_latents - 1:,}; got {', '.join(map(str, outside[:5]))}.",
            hint="`crosscoder diff` and `crosscoder encode` name latents worth a look.",
        )


def _edit(
    kind: Kind,
    latents: Sequence[int],
    values: float | Sequence[float],
    tokens: TokenSelection | None,
    sources: Sequence[str] | None,
) -> Edit:
    listed = tuple(float(v) for v in values) if isinstance(values, Sequence) else (float(values),)
    places = None if sources is None else tuple(sources)
    return Edit(kind, tuple(int(latent) for latent in latents), listed, tokens or AllTokens(), places)


def _named(crosscoder: Crosscoder, written: Sequence[Source], names: Sequence[str]) -> list[Source]:
    """The written sources that keys or aliases name."""
    found = {source.key: source for name in names for source in written if name in (source.key, source.model)}
    known = {name for source in written for name in (source.key, source.model)}
    unknown = [name for name in names if name not in known]
    if unknown or not found:
        raise EditError(
            f"expected sources to edit that the crosscoder writes; got {', '.join(unknown) or 'none'}.",
            details=[f"it writes  {source.key}" for source in written],
            hint="Name one of these, or a model's alias.",
        )
    return list(found.values())
