"""The operations of this backend (`crosscoder.kernels.operations.Operations`).

Patterns may be padded. Tables are fp32 or bf16 and are multiplied and summed in fp32; results are fp32. No operation
waits for the device, none adds atomically: the same input gives the same bits.
"""

from __future__ import annotations

from crosscoder.kernels.triton.row_products import decode_error, pair_products
from crosscoder.kernels.triton.segment_sums import sum_by_latent, sum_by_row

__all__ = ["decode_error", "pair_products", "sum_by_latent", "sum_by_row"]
