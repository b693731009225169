"""Numbers: whether a value is one, its 95% interval over seeds or over questions."""

import math
import operator
import statistics
from collections.abc import Sequence
from typing import Any, TypeGuard

# Student's t, 97.5 %, by degrees of freedom: few seeds or stretches deserve wide intervals.
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def missing(value: Any) -> bool:
    """True for None and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def finite(value: Any) -> TypeGuard[float]:
    """True for an ordinary number."""
    return isinstance(value, int | float) and math.isfinite(value)


def student(freedom: int) -> float:
    """Student's t, 97.5 %, of that many degrees of freedom."""
    beyond = 1.96 + 2.37 / freedom + 2.8 / freedom**2
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else beyond


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample, estimated without bias; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float] | None:
    """95% interval (Student's t) of the mean of independent values; None of fewer than two.

    With weights it is that of sum(w v) / sum(w), a ratio of two sums that both vary, as bits per
    byte over stretches of unequal bytes: that of the ratio estimator (Cochran 1977, chapter 6),
    whose residuals are w (v - ratio) / mean(w). Equal weights are none.
    """
    freedom, total = len(values) - 1, sum(weights) if weights else 1
    if freedom < 1 or not total:
        return None
    shares = [len(values) * weight / total for weight in weights or ()] or [1.0] * len(values)
    mean = sum(map(operator.mul, shares, values)) / len(values)
    apart = (share * (value - mean) for share, value in zip(shares, values, strict=True))
    spread = math.hypot(*apart) / math.sqrt(freedom)  # no overflow
    half = student(freedom) * spread / math.sqrt(len(values))
    return mean - half, mean + half


def wilson(right: float, count: int) -> tuple[float, float]:
    """95% interval of a share that was `right` out of `count` (Wilson 1927)."""
    z = 1.959964
    middle = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
