"""Parquet files that say what they are (metadata `format: crosscoder.<thing>/1`), written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crosscoder import files
from crosscoder.errors import FileFormatError


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
