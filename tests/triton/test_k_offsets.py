"""Matrices of more than 2³¹ elements: their offsets do not fit into 32 bits.

Nothing that large is held: memory that is never touched costs nothing, and the kernels touch little of it. Run in
processes of their own, since a wrong offset reads memory that is not there.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SETUP = """
import torch
from crosscoder.kernels.triton import compaction, operations
from crosscoder.kernels.triton.patterns import PaddedPattern
FAR, WIDTH = 2**27 + 3, 24                    # 3.2e9 elements
table = torch.empty(FAR * WIDTH + 64, dtype=torch.bfloat16)[: FAR * WIDTH].view(FAR, WIDTH)
table[-1] = torch.arange(24.0)
one = torch.tensor([1.0, 0.0])
"""
CASES = {
    "a table by latent": """
pattern = PaddedPattern(torch.tensor([0, 1]), torch.tensor([FAR - 1, 0]), FAR)
assert operations.sum_by_row(pattern, 2 * one, table)[0].tolist() == [2.0 * i for i in range(24)]
assert operations.pair_products(pattern, torch.ones(1, 24), table).tolist() == [276.0, 0.0]
""",
    "a table by row": """
pattern = PaddedPattern(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
pattern.__dict__["rows_by_latent"] = torch.tensor([FAR - 1, 0])
assert operations.sum_by_latent(pattern, 2 * one, table).tolist() == [[2.0 * i for i in range(24)], [0.0] * 24]
""",
    "scores": """
pre = torch.as_strided(table, (4, 40), (FAR * WIDTH // 3 - 40, 1))      # a row starts before 2**31, the last one after
pre[:], pre[3, 7] = 0.0, 5.0
into = compaction.Compaction.empty(pre, 9)
assert compaction.compact(pre, torch.ones(40), into=into).row_pointers.tolist() == [0, 0, 0, 0, 1]
assert into.latents.tolist()[:1] == [7]
levels, run = torch.ones(1), torch.ones(1, dtype=torch.int32)
assert compaction.count_levels(pre, torch.ones(40), levels=levels, run=run).tolist() == [1]
""",
}


@pytest.mark.parametrize("name", CASES)
def test_offsets_are_64_bits_wide(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", SETUP + CASES[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
