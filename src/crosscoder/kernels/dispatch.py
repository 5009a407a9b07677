"""The one rule for which kernels run.

ReLU keeps about half of all latents early in training, where compressed rows cost more than a dense product; every
other nonlinearity keeps a few in thousands, where everything after the encoder is sparse.
"""

from __future__ import annotations

from crosscoder.nonlinearities import Nonlinearity, ReLU


def dense(nonlinearity: Nonlinearity) -> bool:
    """Whether codes of this nonlinearity are computed and decoded as full matrices."""
    return isinstance(nonlinearity, ReLU)
