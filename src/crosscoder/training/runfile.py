"""Run files: reading YAML, applying `key.path=value`, and saying on one screen what is wrong.

YAML is read with three changes that spare surprises: `1e-3` is a number, `on` and `no` are words, and a key given twice
is an error. Overrides are merged before validation, so that a run file and the command line obey the same schema.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from crosscoder.errors import ConfigError, CrosscoderError, UnknownKey
from crosscoder.files import check_format, replacing

Model = TypeVar("Model", bound=BaseModel)
WHERE_TO_LOOK = "`crosscoder train --keys` lists every key with its meaning and default."
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


@dataclass(frozen=True)
class Difference:
    """A key on which two runs differ."""

    key: str
    mine: object
    theirs: object

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.mine)} / {_shown(self.theirs)}"


@dataclass(frozen=True)
class Key:
    """A key that a run file can have."""

    path: str
    default: str
    description: str
    kinds: tuple[str, ...] = ()
    """The kinds of its block that have it, where blocks come in kinds and not all have it alike."""


@dataclass(frozen=True)
class Problem:
    """Something wrong at a place of a run file; `near` is the key that was probably meant there."""

    path: tuple[str, ...]
    text: str
    near: tuple[str, ...] | None = None
    is_unknown_key: bool = False

    def under(self, place: tuple[str, ...]) -> Problem:
        """The same problem, of a block that lies at `place`."""
        return replace(self, path=place + self.path, near=None if self.near is None else place + self.near)

    def __str__(self) -> str:
        near = "" if self.near is None else f"; did you mean {'.'.join(self.near)}?"
        return f"{'.'.join(self.path)}: {self.text}{near}" if self.path else self.text


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, without its surprises."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
    if repeated:
        raise yaml.MarkedYAMLError(None, None, f"a key is given twice: {', '.join(repeated)}", node.start_mark)
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """The value that a piece of YAML stands for."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def read(path: Path) -> dict[str, Any]:
    """The raw content of a run file of a known format."""
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            f"expected a run file {path}; there is none.", hint="Give the path of a YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8.", hint="Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML.", details=str(error).splitlines()) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"expected keys and values in {path}; got {_shown(raw)}.", hint=WHERE_TO_LOOK)
    if "format" not in raw:
        raise ConfigError(f"{path} does not say its format.", hint="Add the line  format: crosscoder.run/1")
    check_format(path, raw["format"], thing="run")
    return raw


def write(path: Path, content: Mapping[str, Any]) -> None:
    """A run file, written whole, in the order of `content`."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def flatten(content: object, prefix: str = "") -> dict[str, object]:
    """Every leaf under its dotted path."""
    if isinstance(content, dict):
        parts = {str(key): value for key, value in content.items()}
    elif isinstance(content, list | tuple):
        parts = {str(index): value for index, value in enumerate(content)}
    else:
        return {prefix: content}
    nested = (flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in parts.items())
    return {path: leaf for part in nested for path, leaf in part.items()}


# Overrides


def override(raw: Mapping[str, Any], overrides: Sequence[str], *, schema: type[BaseModel]) -> dict[str, Any]:
    """`raw` with `key.path=value` applied; list items by number, and a new `kind` drops what it no longer accepts."""
    return put_all(raw, [split_override(text) for text in overrides], schema=schema)


def put_all(
    raw: Mapping[str, Any], pairs: Sequence[tuple[Sequence[str], Any]], *, schema: type[BaseModel]
) -> dict[str, Any]:
    """A copy of `raw` with a value at each path; new kinds first, which drop the keys of the kind there was."""
    changed = deepcopy(dict(raw))
    for path, value in sorted(pairs, key=lambda pair: pair[0][-1] != "kind"):
        _put(changed, path, value)
        if path[-1] == "kind":
            _drop_foreign_keys(changed, path[:-1], schema)
    return changed


def split_override(text: str) -> tuple[list[str], Any]:
    """Path and value of `key.path=value`."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(
            f"expected an override as key.path=value; got {text!r}.", hint="For example train.learning_rate=3e-4"
        )
    try:
        return path.split("."), parse(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {path} is not YAML: {value!r}.", details=str(error).splitlines()) from error


def _put(content: Any, path: Sequence[str], value: object) -> None:
    """Set one value, making the blocks on the way."""
    for depth, part in enumerate(path[:-1]):
        slot = _slot(content, part, path[: depth + 1])
        if _child(content, slot) is None:
            _assign(content, slot, {})
        content = content[slot]
    _assign(content, _slot(content, path[-1], path), value)


def _assign(content: Any, slot: Any, value: object) -> None:
    """Put a value in its place; the place after the last item of a list is a new one."""
    if isinstance(content, list) and slot == len(content):
        content.append(value)
    else:
        content[slot] = value


def _slot(content: object, part: str, path: Sequence[str]) -> Any:
    """The key or index that `part` means in `content`."""
    if isinstance(content, dict):
        return part
    if not isinstance(content, list):
        raise ConfigError(
            f"the override {'.'.join(path)} goes inside {'.'.join(path[:-1])}, which is the value {_shown(content)}.",
            hint=f"Override {'.'.join(path[:-1])} itself.",
        )
    if not part.isdigit() or int(part) > len(content):
        raise ConfigError(
            f"expected a number from 0 to {len(content)} at the end of {'.'.join(path)}; got {part!r}.",
            hint="Items of a list are named by their number; the number after the last one appends.",
        )
    return int(part)


def _drop_foreign_keys(raw: dict[str, Any], path: Sequence[str], schema: type[BaseModel]) -> None:
    block: Any = raw
    for part in path:
        block = block[int(part)] if isinstance(block, list) else block[part]
    models = _models_at(schema, path, raw)
    chosen = _choose(models, block)
    known = {key for model in models for key in model.model_fields}  # a key that no kind has is a mistake, and stays
    if chosen is not None and isinstance(block, dict):
        for key in [key for key in block if key in known and key not in chosen.model_fields]:
            del block[key]


# Explaining


def validate(schema: type[Model], raw: Mapping[str, Any], *, name: str) -> Model:
    """The validated model; raises UnknownKey or ConfigError that lists every problem with its exact path."""
    checked = check(schema, raw)
    if isinstance(checked, list):
        refuse(checked, name=name)
    return checked


def check(
    schema: type[Model], raw: Mapping[str, Any], *, known: type[BaseModel] | None = None
) -> Model | list[Problem]:
    """The validated model, or everything that is wrong with `raw`; keys that were meant are sought in `known`."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(known or schema, raw, detail) for detail in error.errors()]
    return list(dict.fromkeys(problems))


def refuse(problems: Sequence[Problem], *, name: str) -> NoReturn:
    """Raises UnknownKey or ConfigError that lists all of `problems`."""
    kind = UnknownKey if all(problem.is_unknown_key for problem in problems) else ConfigError
    unique = list(dict.fromkeys(map(str, problems)))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    raise kind(f"{name} has {count}.", details=unique, hint=WHERE_TO_LOOK)


def _problem(schema: type[BaseModel], raw: object, detail: Mapping[str, Any]) -> Problem:
    path = tuple(_real_path(raw, detail["loc"]))
    context, given = detail.get("ctx", {}), detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return _unknown(schema, path, raw)
        case "missing":
            return Problem(path, "expected a value; the key is missing")
        case "union_tag_invalid":
            return Problem((*path, "kind"), f"expected {context['expected_tags']}; got {context['tag']!r}")
        case "union_tag_not_found":
            return Problem((*path, "kind"), f"expected a value; {_shown(given)} has none")
        case "value_error" if isinstance(context["error"], CrosscoderError):
            return Problem(path, " ".join(str(context["error"]).split()))
        case "value_error":
            return Problem(path, str(context["error"]))
        case _:
            text = detail["msg"][0].lower() + detail["msg"][1:]
            return Problem(path, f"{text}; got {_shown(given)}")


def _real_path(raw: object, location: Sequence[str | int]) -> list[str]:
    """Pydantic's location without the tags of unions, which the file does not hold."""
    path: list[str] = []
    for place, part in enumerate(location):
        last = place == len(location) - 1
        if isinstance(raw, dict) and part not in raw and not last and raw.get("kind", part) == part:
            continue
        path.append(str(part))
        raw = _child(raw, part)
    return path


def _child(raw: object, part: str | int) -> object:
    if isinstance(raw, dict):
        return raw.get(part)
    if isinstance(raw, list) and str(part).isdigit() and int(part) < len(raw):
        return raw[int(part)]
    return None


def _unknown(schema: type[BaseModel], path: tuple[str, ...], raw: object) -> Problem:
    """There is no such key; the one that was probably meant is among the siblings, else anywhere in the file."""
    parent = _choose(_models_at(schema, path[:-1], raw), _at(raw, path[:-1]))
    siblings = list(parent.model_fields) if parent else []
    elsewhere = [key.path for key in keys(schema) if key.path.rpartition(".")[2] == path[-1]]
    if near := difflib.get_close_matches(path[-1], siblings, n=1):
        return Problem(path, "there is no such key", (*path[:-1], near[0]), is_unknown_key=True)
    if elsewhere:
        return Problem(path, "there is no such key", tuple(elsewhere[0].split(".")), is_unknown_key=True)
    there = f"; the keys here are {', '.join(siblings)}" if siblings else ""
    return Problem(path, f"there is no such key{there}", is_unknown_key=True)


def keys(schema: type[BaseModel]) -> list[Key]:
    """Every key that a file of this schema can have; `*` stands for an alias or a number.

    A key that kinds of a block have alike comes once, with all of them; one that means different things comes for each.
    """
    merged: dict[Key, tuple[str, ...]] = {}
    for key in _keys(schema, "", ()):
        alike = replace(key, kinds=())
        merged[alike] = (*merged.get(alike, ()), *key.kinds)
    return [replace(key, kinds=kinds) for key, kinds in merged.items()]


def _keys(schema: type[BaseModel], prefix: str, kinds: tuple[str, ...]) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        models = _models_in(field.annotation)
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        text = (field.description or "").rstrip(".")
        own = () if name == "kind" else kinds
        yield Key(path, "" if models else default, text[:1].upper() + text[1:], own)
        star = "" if _item(field.annotation) is None else ".*"
        for model in models:
            kind = model.model_fields.get("kind")
            yield from _keys(model, f"{path}{star}.", (kind.default,) if kind and len(models) > 1 else kinds)


def _models_at(schema: type[BaseModel], path: Sequence[str], raw: object) -> list[type[BaseModel]]:
    """The models that can describe the block at `path`; on the way there, those whose `kind` the file names."""
    annotation: object = schema
    for part in path:
        model = _choose(_models_in(annotation), raw) if _item(annotation) is None else None
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else _item(annotation)
        raw = _child(raw, part)
    return [] if _item(annotation) is not None else _models_in(annotation)


def _at(raw: object, path: Sequence[str]) -> object:
    for part in path:
        raw = _child(raw, part)
    return raw


def _choose(models: Sequence[type[BaseModel]], raw: object) -> type[BaseModel] | None:
    kind = raw.get("kind") if isinstance(raw, dict) else None
    named = [model for model in models if "kind" in model.model_fields and kind == model.model_fields["kind"].default]
    return (named or list(models) or [None])[0]


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models in an annotation: itself, the members of a union, the items of a container."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _item(annotation: object) -> object | None:
    """What a container holds: the values of a dict, the items of a list or tuple; None for all else."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return next((item for item in map(_item, arguments) if item is not None), None)
    if origin is dict:
        return arguments[1]
    return arguments[0] if origin in (list, tuple) else None


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return "…"
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
