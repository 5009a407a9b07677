"""How kernels are launched: on their tensors' device, and not at all over an empty grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: object, warps: int) -> None:
    """Run `kernel` with these arguments over `grid`, on the device of the first of them."""
    if 0 not in grid:
        with torch.cuda.device_of(first):
            kernel[grid](first, *others, num_warps=warps, enable_fp_fusion=True)


def assert_tables(*tables: Tensor) -> None:
    """What kernels read is fp32 or bf16; another type would be summed in fp32 without a word."""
    found = [table.dtype for table in tables]
    assert set(found) <= {torch.float32, torch.bfloat16}, f"expected tables of fp32 or bf16; got {found}"


def blocks(size: int, block: Any) -> int:
    """How many blocks of that many elements (a Triton constant) cover `size`."""
    return -(-size // block.value)
