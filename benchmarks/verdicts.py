"""When seeds decide a registered finding: intervals over seeds, for all benchmarks that register findings.

Over at least three seeds, with mean m, standard deviation s and Student's t for n − 1 degrees of freedom, the interval
is `m ± t₀.₉₇₅ s/√n`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan, sqrt
from statistics import mean, stdev
from typing import NamedTuple

FEWEST = 3
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, 97.5 %, for 1 to 30 degrees of freedom."""


class Interval(NamedTuple):
    """Mean and 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of the finite values; NaN for fewer than two."""
    finite = [value for value in values if isfinite(value)]
    if len(finite) < 2:
        return Interval(finite[0] if finite else nan, nan, nan)
    half = T_975[min(len(finite) - 1, len(T_975)) - 1] * stdev(finite) / sqrt(len(finite))
    return Interval(mean(finite), mean(finite) - half, mean(finite) + half)
