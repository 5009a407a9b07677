"""Labels: spans of held-out documents on which a behaviour is said to act, or on which its look-alike stands.

`labels.jsonl`: a first line `{"format": "crosscoder.labels/1", ...}`, then one object per line,

    {"context": "<document hash>", "span": [start, end], "label": "refusal", "value": true}

`span` counts characters of the rendered document; `value` is false on the corresponding span of a look-alike (a
harmless request in the same words, a near-miss phrase). Documents not in the analysis set are passed over and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.errors import FileFormatError, TextError
from crosscoder.files import check_format


class LabelSpan(BaseModel):
    """One labelled span."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    context: str = Field(description="hash of the document")
    span: tuple[int, int] = Field(strict=False, description="first character and the one past the last, as rendered")
    label: str = Field(min_length=1, description="name of the behaviour")
    value: bool = Field(description="whether it acts here; false on a look-alike")


@dataclass(frozen=True)
class LocatedLabels:
    """Labels on the tokens of an analysis set.

    `values[l, t]` is 1 where label l acts on token t, -1 where its look-alike stands, 0 elsewhere or where both hold.
    """

    names: tuple[str, ...]
    values: Int[np.ndarray, "labels tokens"]
    num_documents: int
    num_absent: int


def read_labels(path: str | Path) -> list[LabelSpan]:
    """All labelled spans of a file; raises FileFormatError naming the line that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"expected a file of labels {path}; there is none.", hint="Check the path of --labels.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not text in UTF-8.", hint="Give a labels.jsonl as --labels.") from error
    lines = [(n, text) for n, text in enumerate(content.split("\n"), 1) if text.strip()]
    head = _object(path, *lines[0]) if lines else {}
    check_format(path, head.get("format"), thing="labels")
    return [_span(path, number, text) for number, text in lines[1:]]


def locate_labels(spans: Sequence[LabelSpan], text: AnalysisSet) -> LocatedLabels:
    """The tokens of every span; raises TextError when none of the documents is in the set."""
    names = tuple(sorted({span.label for span in spans}))
    marked = np.zeros((2, len(names), text.num_tokens), dtype=bool)
    known = {document.hash for document in text.documents}
    for span in spans:
        found = text.locate(span.context, span.span)
        tokens = text.pointers[found.context] + found.position
        marked[int(span.value), names.index(span.label), tokens.numpy()] = True
    documents = {span.context for span in spans}
    if not documents & known:
        raise TextError(
            f"none of the {len(documents):,} labelled documents is in the analysis set of {len(known):,}.",
            hint="Labels name documents by the hash of their content: use the text that the labels were made with, and "
            "hold out enough of it.",
        )
    values = marked[1].astype(np.int8) - marked[0].astype(np.int8)
    return LocatedLabels(names, values, len(documents & known), len(documents - known))


def _span(path: Path, number: int, text: str) -> LabelSpan:
    try:
        return LabelSpan.model_validate(_object(path, number, text))
    except ValidationError as error:
        raise FileFormatError(
            f"line {number} of {path} is not a label.",
            details=list(_problems(error)),
            hint='A line is {"context": "<hash>", "span": [start, end], "label": "name", "value": true}.',
        ) from error


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        yield f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _object(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"line {number} of {path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"line {number} of {path} is not a JSON object.")
    return content
