"""Rank correlation of two measures of the same units, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import rankdata

DRAWS = 4000
"""Resamples of a bootstrap interval."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho and its 95% interval by a bootstrap over the units (percentiles, a fixed seed).

    Attributes:
        rho: NaN where one of the measures is the same for all units.
        low: lower end of the interval.
        high: upper end.
        n: units.
    """

    rho: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float], seed: int = 0) -> RankCorrelation:
        """Correlation of two measures of at least two units.

        Raises:
            ValueError: they are not of the same units.
        """
        if len(x) != len(y) or len(x) < 2:
            raise ValueError(f"{len(x)} and {len(y)} values have no rank correlation")
        pairs = np.array([x, y], dtype=float)
        drawn = np.random.default_rng(seed).integers(0, len(x), size=(DRAWS, len(x)))
        resampled = spearman(pairs[0][drawn], pairs[1][drawn])
        some = resampled[np.isfinite(resampled)]  # a resample of one unit only has no correlation
        low, high = np.quantile(some, [0.025, 0.975]) if len(some) else (math.nan, math.nan)
        return cls(float(spearman(pairs[:1], pairs[1:])[0]), float(low), float(high), len(x))

    def __str__(self) -> str:
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]" if math.isfinite(self.rho) else ""


def spearman(x: Float[ndarray, "draws units"], y: Float[ndarray, "draws units"]) -> Float[ndarray, " draws"]:
    """Spearman's rho of every row, equal values sharing their mean rank; NaN for a constant row."""
    ranks = [rankdata(values, axis=1) for values in (x, y)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    product = (a * b).sum(axis=1)
    return np.divide(product, scale, out=np.full_like(product, np.nan), where=scale > 0)
