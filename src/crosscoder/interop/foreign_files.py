"""Files of other tools: where they lie, and tensors and settings out of them; on the CPU, and nothing is executed.

A `.pt` file is a pickle. It is read with `weights_only=True`, which takes tensors and plain containers and refuses
everything else; settings are JSON. No device, class or path that a file names is ever used.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.errors import FileFormatError

WANTED = ("config.json", "trainer_config.json", "model.safetensors", "cfg.json", "cc_weights.pt")
_PICKLES = (".pt", ".pth", ".bin")
_REFUSED = re.compile(r"unsupported (?:global|operand|class|type):? (?:GLOBAL )?(?P<name>\S+)", re.IGNORECASE)
_HUB = re.compile(r"^(?P<repository>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.-]+)*)$")


@dataclass(frozen=True)
class Origin:
    """Where foreign files lie: the path here and, where they came from the Hub, which repository and commit."""

    name: str
    path: Path
    repository: str | None = None
    commit: str | None = None


def locate(source: str | Path, *, revision: str | None = None) -> Origin:
    """The files that `source` names: a file or directory here, or a download of the Hub's `owner/name[/folder]`.

    Raises FileFormatError when there is neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return Origin(str(source), path)
    match = _HUB.match(str(source))
    local = str(source).startswith((".", "/", "~")) or path.suffix in (*_PICKLES, ".safetensors")
    if match is None or local or ".." in path.parts:
        raise FileFormatError(
            f"expected a file, a directory, or a Hub id owner/name or owner/name/folder; got {str(source)!r}.",
            hint="Check the path.",
        )
    return _downloaded(str(source), match["repository"], match["folder"].strip("/"), revision=revision)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.pt` or safetensors file, on the CPU.

    Raises FileFormatError for a file that is cut short, and for a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix not in _PICKLES:
        raise FileFormatError(
            f"expected weights as .pt or .safetensors; got {path.name}.", hint="Give the file that holds the weights."
        )
    content = _unpickled(path)
    strange = [f"{name}: {type(value).__name__}" for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise FileFormatError(
            f"expected {path} to hold tensors by name, as a state dictionary does; some entries are not.",
            details=strange[:8],
            hint="Save model.state_dict() on its own, and convert that file.",
        )
    return content


def read_settings(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not whole JSON: {error}.", hint="Copy or download it again.") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"expected a JSON object in {path}; got a {type(content).__name__}.")
    return content


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file: {error}.",
            details=[f"size: {path.stat().st_size:,} bytes"],
            hint="It was cut short or is of another format: copy or download it again.",
        ) from error


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the unpickler meets
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise FileFormatError(
            f"expected {path} to hold tensors by name; got a {type(content).__name__}.",
            hint="Save model.state_dict(), and convert that file.",
        )
    return {str(name): value for name, value in content.items()}


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    refused = _REFUSED.search(str(error))
    if refused:
        return FileFormatError(
            f"{path} holds more than tensors, and loading it would run its code: refused.",
            details=[f"found  {refused['name'][:200]}"],
            hint="Save model.state_dict() where you trust the file, and convert that.",
        )
    return FileFormatError(
        f"{path} is not a whole file of torch.save: {type(error).__name__}.",
        details=[f"size: {path.stat().st_size:,} bytes"],
        hint="It was cut short or is of another format: copy or download it again.",
    )


def _downloaded(name: str, repository: str, folder: str, *, revision: str | None) -> Origin:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{folder}/{file}" for file in WANTED] if folder else [*WANTED, *(f"*/{file}" for file in WANTED)]
    try:
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileFormatError(
            f"{name!r} is neither a path here nor to be had from the Hub: {type(error).__name__}.",
            hint="Check the name, your access to it, and the network.",
        ) from error
    path = root / folder
    if not path.is_dir():
        raise FileFormatError(
            f"the Hub repository {repository} has no weights in a folder {folder!r}.",
            details=[f"expected  one of {', '.join(WANTED)} in it"],
            hint="Look at the repository's files, and give owner/name/folder.",
        )
    return Origin(name, path, repository, root.name)
