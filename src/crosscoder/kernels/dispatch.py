"""The one rule for which kernels run.

    proposer   a bf16 product proposes and fp32 decides, where the machine multiplies bf16 faster and the product is
               large
    operations Triton's on a CUDA device, where Triton is installed; torch's everywhere else
    dense      full matrices, where more than one pair in sixteen is active: compressed rows then cost more

Selections and gradients are the same either way (`candidates.py`); `precision` overrides the first: `float32` never
proposes in bf16, `mixed` always does.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from crosscoder.kernels import torch_ops
from crosscoder.kernels.operations import Operations

_log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "mixed"]
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


@cache
def operations(device_type: str) -> Operations:
    """The sparse primitives for tensors on a device of this type."""
    if device_type != "cuda":
        return torch_ops
    if not has_triton():
        _log.warning("Triton is not installed: the sparse kernels run as torch operations, at a fraction of the speed.")
        return torch_ops
    from crosscoder.kernels.triton import operations as triton_ops

    return triton_ops


def has_triton() -> bool:
    """Whether the kernels for CUDA devices can run."""
    return importlib.util.find_spec("triton") is not None


def dense(share: float) -> bool:
    """Whether a code with this share of its pairs active is better computed in full matrices."""
    return share > DENSE_SHARE
