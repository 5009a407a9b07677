"""What the tests of the Triton kernels share.

The kernels run on the CPU under Triton's interpreter, which has to be chosen before Triton is imported. So these tests
have a process of their own, `TRITON_INTERPRET=1 pytest tests/triton`, and others do not collect them. Compilation,
which the interpreter excludes, is tested with everything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_compilation.py"] if INTERPRETED else ["test_k_*.py"]


@pytest.fixture(autouse=INTERPRETED)
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dense_sum() -> Callable[..., Tensor]:
    """`dense_sum(index, weights, rows, size)`: `Σ weights · rows` per index in fp64, pair by pair."""

    def total(index: Tensor, weights: Tensor, rows: Tensor, size: int) -> Tensor:
        out = torch.zeros(size, rows.shape[1], dtype=torch.float64)
        return out.index_add(0, index, weights.double()[:, None] * rows.double())

    return total
