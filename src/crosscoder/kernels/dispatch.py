"""The one rule for which kernels run.

ReLU keeps about half of all latents early in training, where compressed rows cost more than a dense product, and the
gradient of JumpReLU's thresholds comes from silent latents too: these two train densely. Every other code has a few
latents in thousands, where everything after the encoder is sparse.
"""

from __future__ import annotations

from crosscoder.nonlinearities import JumpReLU, Nonlinearity, ReLU


def dense(nonlinearity: Nonlinearity, *, training: bool) -> bool:
    """Whether codes of this nonlinearity are computed and decoded as full matrices."""
    return isinstance(nonlinearity, ReLU) or (training and isinstance(nonlinearity, JumpReLU))
