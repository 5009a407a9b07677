"""Files that are whole or not there: written under a temporary name, then renamed; every one says its format.

`format: crosscoder.<thing>/<n>` heads every file. A newer n is refused, another thing is refused, and a file that ends
early is an error that says so.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.errors import DiskFull, FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_FORMAT = re.compile(r"^crosscoder\.([a-z_]+)/([1-9]\d*)$")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not.

    One process writes a path at a time. What a killed process left of an earlier try is removed first.

    Raises DiskFull when there is no room for what the block writes.
    """
    with explaining_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new.tmp")
    aside = path.with_name(f".{path.name}.old.tmp")
    _recover(path, aside)
    _remove(draft)
    try:
        with explaining_full_disk(path):
            yield draft
            _sync(draft)
            if path.is_dir():
                path.replace(aside)
            draft.replace(path)
    finally:
        _remove(draft)
        _recover(path, aside)


def is_draft(path: Path) -> bool:
    """Whether a path is a leftover of `replacing` in a process that was killed."""
    return path.name.startswith(".") and path.name.endswith((".new.tmp", ".old.tmp"))


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Turns the system's "no space left" and "file too large" into DiskFull."""
    try:
        yield
    except Exception as error:
        if not _is_no_room(error):
            raise
        free = shutil.disk_usage(_existing(path)).free
        raise DiskFull(
            f"no room to write {path}.",
            details=[f"free on that disk: {free / 1e9:.2f} GB", f"the system said: {error}"],
            hint="Free some space, lift the file-size limit, or choose another directory. Nothing half-written stays.",
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON object, written whole."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_json(path: Path, *, thing: str, version: int = 1) -> dict[str, Any]:
    """The JSON object in `path`, which must say `crosscoder.<thing>/n` with n up to `version`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"expected a file {path}; there is none.", hint=f"It holds a {thing}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{path} is not whole JSON: {error}.", hint="Write it again, or copy it again."
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    check_format(path, found, thing=thing, version=version)
    return content


def check_format(path: Path, found: object, *, thing: str, version: int = 1) -> None:
    """Raises FileFormatError unless `found` is `crosscoder.<thing>/n` with 1 <= n <= version."""
    match = _FORMAT.match(found) if isinstance(found, str) else None
    if match is None or match[1] != thing:
        raise FileFormatError(
            f"{path} is not a {thing} of this package.",
            details=[f"expected  format: crosscoder.{thing}/{version}", f"found     format: {found}"],
            hint="Give the path of one that this package wrote.",
        )
    if int(match[2]) > version:
        raise FileFormatError(
            f"{path} was written by a newer version of this package ({found}; this one reads up to /{version}).",
            hint="Update: pip install --upgrade crosscoder.",
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, thing: str, version: int = 1) -> None:
    """Tensors in one safetensors file, written whole."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as draft:
        save_file(whole, draft, metadata={"format": f"crosscoder.{thing}/{version}"})


def read_tensors(path: Path, *, thing: str, version: int = 1, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file that `write_tensors` wrote."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileFormatError(f"expected a file {path}; there is none.", hint=f"It holds the tensors of a {thing}.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            check_format(path, (file.metadata() or {}).get("format"), thing=thing, version=version)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file: {error}.",
            details=[f"size: {path.stat().st_size:,} bytes"],
            hint="It was cut short or is of another format: copy or download it again.",
        ) from error


def _is_no_room(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    text = str(error)
    return "File too large" in text or "No space left" in text or "quota exceeded" in text.lower()


def _sync(path: Path) -> None:
    """Flush to disk, so that the rename never outlives the contents."""
    parts = [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())
    for part in parts:
        with part.open("rb+") as file:
            os.fsync(file.fileno())


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _recover(path: Path, aside: Path) -> None:
    """Put the old directory back when its replacement never came, and drop it when it did."""
    if aside.exists() and not path.exists():
        aside.replace(path)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
