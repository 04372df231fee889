"""Several runs of the same setting as one number with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sparsify.report.numbers import format_number


@dataclass(frozen=True)
class Spread:
    """Mean and 95% interval of a few independent runs.

    Attributes:
        mean: of the runs.
        half: half the width of Student's 95% interval of the mean; NaN for a single run.
        n: runs.
    """

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and interval of at least one value."""
        n, mean = len(values), float(np.mean(values))
        if n < 2:
            return cls(mean, math.nan, n)
        error = float(np.std(values, ddof=1)) / math.sqrt(n)
        return cls(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)

    def __str__(self) -> str:
        number = format_number(self.mean)
        return number if self.n < 2 else f"{number} ± {format_number(self.half)} ({self.n})"


def median_and_range(values: Sequence[float], number: Callable[[float], str] = format_number) -> str:
    """`180 [170 to 210] (3)`, where runs are too wild for means; a single run is its number."""
    middle = number(float(np.median(values)))
    if len(values) < 2:
        return middle
    return f"{middle} [{number(min(values))} to {number(max(values))}] ({len(values)})"
