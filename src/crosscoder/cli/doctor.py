"""`crosscoder doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer

from crosscoder.cli.reporting import print_json
from crosscoder.demo.files import MODELS, data_path

EXTRAS = {
    "peft": "LoRA adapters (models.*.adapter)",
    "wandb": "crosscoder train --track wandb",
    "tensorboard": "crosscoder train --track tensorboard",
}
DEMO_MEMORY_GB = 4.0
DEMO_DISK_GB = 1.0
HUB = "model hub"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `missing` keeps something from working, `note` does not."""

    name: str
    state: Literal["ok", "note", "missing"]
    text: str
    fix: str | None = None


def run(*, network: bool, as_json: bool) -> None:
    """Print the findings; exit code 1 when something that the demo needs is missing."""
    findings = list(examine(network=network))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"{finding.state:8}{finding.name:14}{finding.text}")
            if finding.fix:
                typer.echo(f"{'':22}{finding.fix}")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def examine(*, network: bool) -> Iterator[Finding]:
    """All findings, in the order in which they are printed."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from _packages()
    yield from _devices()
    yield _memory()
    yield _disk()
    yield from _extras()
    yield _pair()
    yield _hub() if network else Finding(HUB, "note", "not asked", "crosscoder doctor --network")


def _packages() -> Iterator[Finding]:
    for name in ("torch", "transformers", "datasets"):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", f"pip install {name}")


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch

        from crosscoder.capture import loading
    except ImportError as error:
        yield Finding("cpu", "note", f"{cores} cores; nothing more is known without {error.name}")
        return
    fast = loading.default_cpu_dtype() == torch.bfloat16
    yield Finding("cpu", "ok", f"{cores} cores, bfloat16 in hardware: {'yes' if fast else 'no'}")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bfloat16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        yield Finding(f"cuda:{index}", "ok", f"{card.name}, {card.total_memory / 1e9:.0f} GB, bfloat16: {bfloat16}")
    if not torch.cuda.is_available():
        yield Finding("cuda", "note", "no device: models and training run on the CPU")


def _memory() -> Finding:
    total = memory_bytes()
    if total is None:
        return Finding("memory", "note", "unknown on this system")
    text = f"{total / 1e9:.1f} GB"
    if total < DEMO_MEMORY_GB * 1e9:
        return Finding(
            "memory", "note", f"{text}; the demo takes up to {DEMO_MEMORY_GB:.0f} GB", "Close other programs."
        )
    return Finding("memory", "ok", text)


def memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is lower; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    if free < DEMO_DISK_GB * 1e9:
        return Finding("disk", "missing", text, f"Free some space: the demo writes up to {DEMO_DISK_GB:.0f} GB.")
    return Finding("disk", "ok", text)


def _extras() -> Iterator[Finding]:
    for package, purpose in EXTRAS.items():
        if find_spec(package) is None:
            yield Finding(package, "note", f"not installed; for {purpose}", f"pip install 'crosscoder[{package}]'")
        else:
            yield Finding(package, "ok", metadata.version(package))


def _pair() -> Finding:
    absent = [alias for alias in MODELS if not (data_path() / alias / "model.safetensors").is_file()]
    if absent:
        fix = "pip install --force-reinstall --no-deps crosscoder"
        return Finding("demo models", "missing", f"not in this installation: {', '.join(absent)}", fix)
    return Finding("demo models", "ok", ", ".join(MODELS))


def _hub() -> Finding:
    from urllib.request import urlopen

    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        return Finding(HUB, "note", "not asked: huggingface_hub is not installed", "pip install huggingface_hub")
    try:
        urlopen(ENDPOINT, timeout=5).close()
    except OSError as error:
        return Finding(HUB, "note", f"no answer ({error})", "Give local directories as models.*.path and local text.")
    return Finding(HUB, "ok", "answers")
