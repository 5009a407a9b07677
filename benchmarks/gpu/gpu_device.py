"""The device that a check or a benchmark runs on: found, described, timed."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
from triton import __version__ as triton_version
from triton import knobs

TRAINER_NEEDS = {"numpy": "numpy", "pydantic": "pydantic", "xxhash": "xxhash", "yaml": "pyyaml"}
"""What the trainer imports and the kernels do not: modules, and the packages that they come in."""


@dataclass(frozen=True)
class Facts:
    """What ran where."""

    device: str
    python: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: copied bytes (read and written) and bf16 multiply-adds, a second."""

    copy: float
    product: float


def arguments(purpose: str | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--out", type=Path, help="a folder for the results as JSON and Markdown")
    parser.add_argument("--interpret", action="store_true", help="a tiny size on the CPU, under TRITON_INTERPRET=1")
    return parser.parse_args()


def device(options: argparse.Namespace) -> str | None:
    """`cuda`, or `cpu` for a dry run; None, and a line that says so, where there is nothing to run on."""
    if options.interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("--interpret needs the environment variable TRITON_INTERPRET=1.")
        return "cpu"
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing was run. (TRITON_INTERPRET=1 with --interpret makes a dry run on the CPU.)")
        return None
    assert not knobs.runtime.interpret, "the interpreter would be measured, not the GPU"
    return "cuda"


def missing_for_the_trainer() -> str | None:
    """A line that names what the trainer needs and cannot be imported here, and how to get it; None if all can be."""
    missing = [package for module, package in TRAINER_NEEDS.items() if not _imports(module)]
    if not missing:
        return None
    return (
        f"The trainer is left out, for want of {', '.join(missing)}: `pip install {' '.join(missing)}`, or unpack the "
        "wheels, made for this Python, into a folder on PYTHONPATH."
    )


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def facts(device: str) -> Facts:
    """Names and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted"
    return Facts(name, platform.python_version(), torch.__version__, triton_version)


def described(device: str) -> str:
    """The facts in one line."""
    return ", ".join(f"{key} {value}" for key, value in asdict(facts(device)).items())


def ceilings() -> Ceilings:
    """Measured: a copy of 4 GB, and a product of 8,192³ random numbers."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    multiplied = milliseconds(lambda: a @ b)
    return Ceilings(2 * 4 * 2**30 / copied * 1e3, 2 * 8192**3 / multiplied * 1e3)


def milliseconds(work: Callable[[], object], *, times: int = 10) -> float:
    """The median time of `work` on the GPU, by events."""
    for _ in range(3):
        work()
    taken: list[float] = []
    for _ in range(times):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)
