"""Is the product right on this GPU? Every check prints a line; the exit code is 1 if one failed.

    python benchmarks/gpu/check.py                                   # on a CUDA device, a few minutes
    TRITON_INTERPRET=1 python benchmarks/gpu/check.py --interpret    # the same checks on the CPU, at a tiny size

Of the kernels: edge cases of every operation, of the selection and of the update; more than 2³¹ elements. Of the
trainer on them: a step against dense fp64, two runs bit for bit, no synchronisation, all three also with a tenth of the
latents dead; a step at the size of Gemma-2-2B against fp64 on some rows and latents. Where what the trainer needs
cannot be imported, a line says so, and the kernels alone are checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import gpu_device
import gpu_kernel_checks
import gpu_lines
import torch
from gpu_lines import Line

Part = tuple[str, Callable[[], Iterator[Line]]]


def main() -> None:
    """Run every check and say what came of it."""
    options = gpu_device.arguments(__doc__)
    device = gpu_device.device(options)
    if device is None:
        return
    left_out = gpu_device.missing_for_the_trainer()
    print(gpu_device.described(device), *([left_out] if left_out else []), sep="\n", flush=True)
    lines: list[Line] = []
    for line in outcomes(parts(device, with_trainer=left_out is None), device):
        print(f"{'ok  ' if line.holds else 'FAIL'}  {line.what}: {line.seen}", flush=True)
        lines.append(line)
    if options.out is not None:
        gpu_lines.write(lines, left_out, device, options.out)
    failed = sum(not line.holds for line in lines)
    print(f"{len(lines) - failed} of {len(lines)} checks hold." + (" The trainer was left out." if left_out else ""))
    sys.exit(failed > 0)


def parts(device: str, *, with_trainer: bool) -> list[Part]:
    """The checks of the kernels, and those of the trainer where it can be imported."""
    kernels: list[Part] = [
        ("edge cases", lambda: gpu_kernel_checks.edges(device)),
        ("selection", lambda: gpu_kernel_checks.selections(device)),
        ("optimiser", lambda: gpu_kernel_checks.updates(device)),
        ("more than 2^31 elements", lambda: gpu_kernel_checks.far(device)),
    ]
    if not with_trainer:
        return kernels
    import gpu_trainer_checks  # it brings in what bare images lack

    return kernels + gpu_trainer_checks.parts(device)


def outcomes(parts: list[Part], device: str) -> Iterator[Line]:
    """Every check in turn; one that cannot be made is one that does not hold."""
    for name, part in parts:
        try:
            yield from part()
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            yield Line(name, False, f"{type(error).__name__}: {str(error)[:300]}")
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
