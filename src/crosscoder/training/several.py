"""Several dictionaries in one run file, or in one call: runs that are alike in all that decides the stream.

    dictionaries:
      small: {wiring: {num_latents: 4096}, nonlinearity: {k: 16}}
      large: {wiring: {num_latents: 16384}}

Each name stands for an ordinary run: the file without `dictionaries`, with the entry's keys put over its own, in the
directory `out/<name>`. An entry may hold what one dictionary decides by itself (`OWN`), never what the stream depends
on, so that all of them see the same batches, and each becomes what it would have become alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from crosscoder.errors import ConfigError
from crosscoder.training import runfile
from crosscoder.training.config import RunConfig, TrainConfig
from crosscoder.training.runfile import Problem

OWN = ("wiring", "nonlinearity", "sparsity", "losses", "init", "train")
"""Blocks of which a dictionary may have its own keys."""
RHYTHM = ("num_tokens", "batch_size", "checkpoint_every", "evaluate_every", "log_every")
"""Keys of `train` that all have in common."""
_KEY = "dictionaries"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class RunFile(RunConfig):
    """All keys of a run file: those of a run, and the dictionaries that it may be trained as."""

    dictionaries: dict[str, dict[str, Any]] | None = Field(
        default=None,
        description="Several dictionaries from one stream: a name, which becomes a directory in out, to the keys that "
        f"are its own, in blocks as above: {', '.join(OWN)} (but for train.{', train.'.join(RHYTHM)}).",
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, ...]:
    """The runs that a file describes: one, or one for each of its dictionaries, `key.path=value` applied.

    Raises UnknownKey or ConfigError with every problem in one message.
    """
    path = Path(path)
    pairs = [runfile.split_override(text) for text in overrides]
    raw = runfile.read(path)
    entries = _entries(raw.pop(_KEY, None), [(rest, value) for [head, *rest], value in pairs if head == _KEY], path)
    raw = runfile.put_all(raw, [pair for pair in pairs if pair[0][0] != _KEY], schema=RunConfig)
    raw.setdefault("out", f"runs/{path.stem}")
    members = [_Member.of(name, entry, raw) for name, entry in entries.items()] or [_Member((), {}, raw)]
    checked = [(member, runfile.check(RunConfig, member.raw, known=RunFile)) for member in members]
    problems = [problem for name, entry in entries.items() for problem in _misplaced(name, entry)]
    problems += _placed([(member, found) for member, found in checked if isinstance(found, list)], len(members))
    if problems:
        runfile.refuse(problems, name=str(path))
    return tuple(run for _, run in checked if isinstance(run, RunConfig))


def require_one_stream(runs: Sequence[RunConfig]) -> None:
    """Raises ConfigError unless the runs can be trained on one stream, each in a directory of its own."""
    first, *others = runs
    both = [d for run in others for d in (*first.differences(run), *run.differences(first)) if not _is_own(d.key)]
    if both:
        raise ConfigError(
            "dictionaries that train together have all in common that decides their stream; these keys differ.",
            details=list({d.key: str(d) for d in reversed(both)}.values())[::-1],
            hint="Train them one after the other, or make these keys equal.",
        )
    if len({run.out for run in runs}) < len(runs):
        raise ConfigError("every dictionary needs a directory of its own; two have one.", hint="Give each its own out.")


@dataclass(frozen=True)
class _Member:
    """One dictionary of a file: where it is described, its own keys, and the whole run that they make."""

    place: tuple[str, ...]
    entry: Mapping[str, Any]
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any], common: Mapping[str, Any]) -> _Member:
        own = {key: value for key, value in entry.items() if key in OWN}
        wiring = own.get("wiring")
        if isinstance(wiring, dict) and "combine" in wiring:
            own["wiring"] = {"kind": "combine", **wiring}
        raw = runfile.put_all(common, list(_leaves(own)), schema=RunConfig)
        return cls((_KEY, name), entry, {**raw, "out": f"{common['out']}/{name}"})

    def decides(self, path: Sequence[str], *, shared: bool) -> bool:
        """Whether what is wrong at `path` is the entry's: it is there, or it is missing from a block of the entry.

        What is missing elsewhere is the entry's where other dictionaries have it (it is not `shared`).
        """
        if _has(self.entry, path) or _has(self.raw, path):
            return _has(self.entry, path)
        return not shared or (len(path) > 0 and path[0] in self.entry)


def _entries(raw: object, overrides: Sequence[tuple[list[str], Any]], path: Path) -> dict[str, dict[str, Any]]:
    """The entries by name, with their overrides; none where the file has one dictionary."""
    if raw is None and not overrides:
        return {}
    named = raw if isinstance(raw, dict) else {}
    wrong = [str(name) for name, entry in named.items() if not (_NAME.match(str(name)) and isinstance(entry, dict))]
    if wrong or not named:
        raise ConfigError(
            f"expected {_KEY} in {path} to hold names with the keys of each.",
            details=[f"{_KEY}.{name}" for name in wrong],
            hint="For example  dictionaries: {small: {nonlinearity: {k: 16}}, large: {nonlinearity: {k: 64}}}. "
            "Names are directories: letters, digits, dot, dash and underscore.",
        )
    for place, _ in overrides:
        if len(place) < 2 or place[0] not in named:
            near = difflib.get_close_matches(place[0], named, n=1) if place else []
            raise ConfigError(
                f"expected an override of a key of one dictionary; got {'.'.join([_KEY, *place])}.",
                details=[f"there is  {_KEY}.{name}" for name in near or named],
                hint=f"For example {_KEY}.{next(iter(near or named))}.nonlinearity.k=16",
            )
    own = {name: [(rest, value) for [head, *rest], value in overrides if head == name] for name in named}
    return {name: runfile.put_all(entry, own[name], schema=RunConfig) for name, entry in named.items()}


def _leaves(block: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value under its path; lists are values."""
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _leaves({str(name): inner for name, inner in value.items()}, (*above, key))
        else:
            yield (*above, key), value


def _misplaced(name: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys of an entry that are common to all, or that no run has."""
    train = entry.get("train")
    common = [(key,) for key in entry if key not in OWN and key in RunConfig.model_fields]
    common += [("train", key) for key in (train if isinstance(train, dict) else {}) if key in RHYTHM]
    for path in common:
        yield Problem((_KEY, name, *path), "this is common to all dictionaries: give it once, at the top of the file")
    for key in entry:
        if key not in RunConfig.model_fields:
            near = difflib.get_close_matches(str(key), OWN, n=1)
            there = "" if near else f"; the keys here are {', '.join(OWN)}"
            meant = (_KEY, name, near[0]) if near else _meant(name, str(key))
            yield Problem((_KEY, name, str(key)), f"there is no such key{'' if meant else there}", meant, True)


def _meant(name: str, key: str) -> tuple[str, ...] | None:
    """`learning_rate` of an entry is `train.learning_rate`."""
    return (_KEY, name, "train", key) if key in TrainConfig.model_fields and key not in RHYTHM else None


def _placed(found: Sequence[tuple[_Member, list[Problem]]], num_members: int) -> Iterator[Problem]:
    """Each problem where the file has its cause: in an entry, or at the top, where all dictionaries share it."""
    for member, problems in found:
        for problem in problems:
            shared = num_members == sum(problem in others for _, others in found)
            yield problem.under(member.place) if member.decides(problem.path, shared=shared) else problem


def _has(block: object, path: Sequence[str]) -> bool:
    for part in path:
        if isinstance(block, list) and part.isdigit() and int(part) < len(block):
            block = block[int(part)]
        elif isinstance(block, dict) and part in block:
            block = block[part]
        else:
            return False
    return len(path) > 0


def _is_own(key: str) -> bool:
    block, _, rest = key.partition(".")
    return key == "out" or (block in OWN and (block != "train" or rest not in RHYTHM))
