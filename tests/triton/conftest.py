"""What the tests of the Triton kernels share.

The kernels run on the CPU under Triton's interpreter, which has to be chosen before Triton is imported. So these tests
have a process of their own, `TRITON_INTERPRET=1 pytest tests/triton`, and others do not collect them. Compilation,
which the interpreter excludes, is tested with everything else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_compilation.py"] if INTERPRETED else ["test_k_*.py"]

if INTERPRETED:  # what runs on a GPU is run here too
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
