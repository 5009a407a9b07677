"""What `--doses` and `--tokens` of `crosscoder steer` mean."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from crosscoder.errors import ConfigError, EditError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crosscoder.crosscoder import Crosscoder
    from crosscoder.interventions import Dose, TokenSelection

DEFAULT_DOSES = "ablate,-1,0,0.5,1,2,4"
_DOSES = "Write for example --doses ablate,0,1,2,4 (multiples of the largest value), or scale=2, clamp=1.5, add=0.3."
_TOKENS = "Write all, prompt, reply, reply:N (its first N tokens), roles as user,template, or positions as 3,4."

Parsed = list[tuple[str, float | None]]
"""Kinds and values; a bare number is of kind `max`, and `("max", 0.0)` is the model as it is."""


def chosen_doses(doses: str | None, *, ablate: bool) -> Parsed:
    """The doses of `--doses` or `--ablate`, none twice; the untouched model first where it is not among them."""
    if ablate and doses is not None:
        raise ConfigError(
            f"expected --doses or --ablate, not both; got --ablate and --doses {doses}.",
            hint="--ablate is short for --doses 0,ablate: write ablate among the doses.",
        )
    found = list(dict.fromkeys(parse_doses("ablate" if ablate else DEFAULT_DOSES if doses is None else doses)))
    return found if ("max", 0.0) in found else [("max", 0.0), *found]


def parse_doses(text: str) -> Parsed:
    """`ablate,scale=2,clamp=1,add=.5,0,1` as pairs of a kind and a value."""
    found: Parsed = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        kind, equals, value = part.partition("=")
        if part == "ablate":
            found.append(("ablate", None))
        elif equals and kind in ("scale", "clamp", "add"):
            found.append((kind, _number(value, part)))
        else:
            found.append(("max", _number(part, part)))
    if not found:
        raise ConfigError("expected doses; got none.", hint=_DOSES)
    return found


def parse_tokens(text: str) -> TokenSelection:
    """`all`, `prompt`, `reply`, `reply:5` (its first tokens), positions as `3,4`, or roles as `user,assistant`."""
    from crosscoder.activations import ROLES
    from crosscoder.interventions import AllTokens, Positions, PromptTokens, ReplyTokens, Roles

    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    plain = {"all": AllTokens(), "prompt": PromptTokens(), "reply": ReplyTokens()}
    head, colon, first = text.strip().partition(":")
    if len(parts) == 1 and parts[0] in plain:
        return plain[parts[0]]
    if head == "reply" and colon and first.isdecimal():
        return ReplyTokens(first=int(first))
    if parts and all(part.isdecimal() for part in parts):
        return Positions(tuple(int(part) for part in parts))
    if not parts or any(part not in ROLES for part in parts):
        raise EditError(f"expected tokens to edit; got {text!r}.", details=[f"roles  {', '.join(ROLES)}"], hint=_TOKENS)
    return Roles(parts)


def as_doses(
    crosscoder: Crosscoder,
    parsed: Parsed,
    largest: Mapping[int, float],
    *,
    tokens: TokenSelection,
    sources: Sequence[str] | None,
) -> list[Dose]:
    """The edits of every dose, of the latents in `largest`, which are all edited together."""
    from crosscoder.interventions import Dose, ablate, add, clamp, scale
    from crosscoder.interventions.edits import check_latents

    latents = list(largest)
    check_latents(crosscoder, latents)
    where: Any = {"tokens": tokens, "sources": sources}
    found: list[Dose] = []
    for kind, value in parsed:
        if kind == "ablate" or value is None:
            found.append(Dose("ablate", (ablate(latents, **where),)))
        elif kind == "max":
            edits = (add(latents, [value * most for most in largest.values()], **where),) if value else ()
            found.append(Dose(f"{value:+g}" if value else "0", edits, value))
        else:
            make = {"scale": scale, "clamp": clamp, "add": add}[kind]
            found.append(Dose(f"{kind} {value:g}", (make(latents, value, **where),)))
    return found


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"expected a dose or a number; got {whole!r}.", hint=_DOSES) from error
    if not isfinite(value):
        raise ConfigError(f"expected a finite dose; got {whole!r}.", hint=_DOSES)
    return value
