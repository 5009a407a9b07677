"""The run-time type checker of the tests: beartype, with what it cannot check by itself seen to.

The import hook decorates methods one by one, and beartype knows `Self` only in classes that it decorated whole, and
protocols only where they are marked as checkable at run time.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self, get_args, runtime_checkable

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a fine float


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked on every call, except for those that say `Self`."""
    annotations = getattr(function, "__annotations__", {})
    for annotation in annotations.values():
        for part in _parts(_evaluated(annotation, function)):
            if getattr(part, "_is_protocol", False) and not getattr(part, "_is_runtime_protocol", False):
                runtime_checkable(part)
    if any(annotation in (Self, "Self") for annotation in annotations.values()):
        function.__annotations__ = {name: value for name, value in annotations.items() if value not in (Self, "Self")}
    return _CHECK(function)


def _evaluated(annotation: object, function: Callable[..., Any]) -> object:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except NameError:  # imported for the type checker only, or defined further down: beartype looks it up later
        return None


def _parts(annotation: object) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
