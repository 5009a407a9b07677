"""The one rule for which kernels run.

    proposer   a bf16 product proposes and fp32 decides, where the machine multiplies bf16 faster and the product is
               large
    backend    Triton's for fp32 on a CUDA device, where Triton is installed; torch's everywhere else
    dense      full matrices, where more than one pair in sixteen is active: compressed rows then cost more

Selections and gradients are the same either way (`candidates.py`). Settings override the first two: with `precision`
float32 never proposes in bf16 and mixed always does; `kernels: torch` leaves Triton alone.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from crosscoder.kernels import selection, torch_ops
from crosscoder.kernels.operations import Backend

_log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "mixed"]
Kernels = Literal["auto", "torch"]
TORCH = Backend(torch_ops, selection, fused_adam=False)
DENSE_SHARE = 1 / 16
SMALL_PRODUCT = 2**26
"""Multiplications below which a bf16 product is not worth its copies."""


def proposes(x: Tensor, encoder: Tensor, precision: Precision) -> bool:
    """Whether a bf16 copy of the encoder proposes the pairs that fp32 then decides on."""
    if encoder.dtype != torch.float32 or precision == "float32":
        return False
    large = x.shape[0] * encoder.numel() >= SMALL_PRODUCT
    return precision == "mixed" or (large and fast_in_bf16(encoder.device.type))


@cache
def fast_in_bf16(device_type: str) -> bool:
    """Whether this machine has instructions for bf16 products."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def backend(like: Tensor, kernels: Kernels) -> Backend:
    """The kernels for tensors of this kind on this device."""
    return _backend(like.device.type, like.dtype, kernels)


@cache
def _backend(device_type: str, dtype: torch.dtype, kernels: Kernels) -> Backend:
    if device_type != "cuda" or dtype != torch.float32 or kernels == "torch":
        return TORCH
    if importlib.util.find_spec("triton") is None:
        _log.warning("Triton is not installed: the sparse kernels run as torch operations, at a fraction of the speed.")
        return TORCH
    from crosscoder.kernels.triton.backend import TRITON

    return TRITON


def dense(share: float) -> bool:
    """Whether a code with this share of its pairs active is better computed in full matrices."""
    return share > DENSE_SHARE
