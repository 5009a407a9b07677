"""What changes over a run: learning rate, sparsity coefficient, k. Functions of the step, nothing remembered."""

from __future__ import annotations


def learning_rate_factor(step: int, *, num_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Up linearly over the warm-up, flat, then down linearly over the last `decay_steps`; never exactly 0."""
    up = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    left = num_steps - step
    down = left / decay_steps if decay_steps and left < decay_steps else 1.0
    return max(0.0, min(up, down))


def ramp(step: int, *, num_steps: int) -> float:
    """From 0 up to 1 over `num_steps`, then 1."""
    return 1.0 if num_steps <= 0 else min(1.0, step / num_steps)


def annealed_k(step: int, *, k: int, start: int | None, num_steps: int) -> int:
    """From `start` down to `k` linearly over `num_steps`; `k` throughout when there is no start."""
    if start is None or num_steps <= 0 or step >= num_steps:
        return k
    return round(start + (k - start) * step / num_steps)
