"""The Triton backend, for fp32 on CUDA devices."""

from __future__ import annotations

from crosscoder.kernels.operations import Backend
from crosscoder.kernels.triton import encodings, operations

TRITON = Backend(operations, encodings, fused_adam=True)
