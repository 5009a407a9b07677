"""The run-time type checker of the tests: beartype, told to leave `Self` alone.

The import hook decorates methods one by one, and beartype knows `Self` only in classes that it decorated whole.
"""

from collections.abc import Callable
from typing import Any, Self

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked on every call, except for those that say `Self`."""
    annotations = getattr(function, "__annotations__", {})
    if any(annotation in (Self, "Self") for annotation in annotations.values()):
        function.__annotations__ = {name: value for name, value in annotations.items() if value not in (Self, "Self")}
    return beartype(function)
