"""Parquet files that say what they are (metadata `format: crosscoder.<thing>/1`), written whole; values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crosscoder import files
from crosscoder.errors import FileFormatError


def json_values(content: Any) -> Any:
    """The same content with null for NaN and infinity, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: json_values(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [json_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_table(path: Path, table: pa.Table, *, thing: str) -> None:
    """The table as Parquet."""
    metadata = {**(table.schema.metadata or {}), b"format": f"crosscoder.{thing}/1".encode()}
    with files.replacing(path) as draft:
        pq.write_table(table.replace_schema_metadata(metadata), draft, compression="zstd")


def read_table(path: Path, *, thing: str, latents: Sequence[int] | None = None) -> pa.Table:
    """A table that `write_table` wrote; only the rows of some `latents` when they are given."""
    if not path.is_file():
        raise FileFormatError(f"expected a file {path}; there is none.", hint="`crosscoder evaluate` writes it.")
    chosen = None if latents is None else pc.field("latent").isin(list(latents))
    try:
        table = pq.read_table(path, filters=chosen)
    except pa.ArrowInvalid as error:
        raise FileFormatError(f"{path} is not whole Parquet: {error}.", hint="Write it again.") from error
    found = (table.schema.metadata or {}).get(b"format", b"")
    files.check_format(path, found.decode("utf-8", "replace"), thing=thing)
    return table
