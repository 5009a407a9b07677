"""Numbers in JSON, which has neither NaN nor infinity: null stands for both, on disk and on the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_values(content: Any) -> Any:
    """The same content with null for NaN and infinity, however deep."""
    if isinstance(content, Mapping):
        return {key: json_values(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [json_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_text(content: Any, *, indent: int | None = None) -> str:
    """The content as JSON that every program reads; what JSON has no type for (a path, a date) as text."""
    return json.dumps(json_values(content), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
