"""LoSA's layer sparsities: blocks whose inputs are like those of all others are redundant and pruned more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import HIGH
from sparsify.allocators.profile import Profile, by_block
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable, check_whole

if TYPE_CHECKING:
    from sparsify.allocators.context import Context

Solver = Literal["exact", "slsqp"]

RELEASED_D = ((0.5, 0.01), (0.6, 0.02), (math.inf, 0.03))
"""The release's d up to a sparsity. It has no branch above 0.7, where the last one stays."""

MOST_B = 1000.0
"""Beyond this exp(-b t) of the most similar of two blocks is zero."""


@dataclass(frozen=True)
class Similarity(Allocator):
    """Sparsities that take the least importance: half of the blocks at S + d, the other half at S - d.

    Source: LoSA (arXiv 2502.14816), the layer-wise sparsity rate, by the released code (`main/prune.py`, `CKA/cka.py`):

        t_i = sum_{j != i} CKA(i, j), scaled to sum one;  I_i = exp(-b t_i)
        min sum_i I_i s_i  so that mean(s) = S and S - d <= s_i <= S + d

    CKA is of block inputs, over windows (`analysis.similarity.block_similarity`). The optimum is a sort: the half of
    the blocks with the larger t at S + d, the other half at S - d, of an odd number the middle one at S. As it depends
    on the order of the t_i alone, b is of no matter to it. The release asks SLSQP, from s = 1, which finds the same
    optimum or stops on the way to it, where the objective changes by less than 1e-6: then b does matter.

    Deviations: mean and objective are weighted by the blocks' sizes, so that the budget is one of zeros and an
    importance the price of a zero (no effect on decoders of equal blocks); a block is within [0, 0.99]. The paper
    writes nHSIC, the release CKA; so `measure` is an option.

    Attributes:
        measure: `cka` (released code) or `hsic` (paper), the same without centring.
        windows: calibration windows, the first ones: 64 in the release (32 for 13B); None for all.
        b: of the importance; the release has 1 with Wanda and 100 with SparseGPT.
        d: how far a block's sparsity is from S at most; None is the release's .01 up to 50%, .02 up to 60%, else .03.
        solver: `exact`, or `slsqp` as released: of SmolLM2-135M's 30 blocks 14 reach a bound then, 22 with b = 100.
    """

    measure: Literal["cka", "hsic"] = "cka"
    windows: int | None = 64
    b: float = 1.0
    d: float | None = None
    solver: Solver = "exact"
    version: int = 1

    def __post_init__(self) -> None:
        if self.measure not in ("cka", "hsic"):
            raise UsageError("Unknown measure of similarity", got=self.measure, allowed="cka, hsic")
        check_whole("windows", self.windows, least=3, or_null=True)
        if not isinstance(self.b, int | float) or not 0 < self.b <= MOST_B:
            raise UsageError("b scales similarities", got=self.b, allowed=f"0 < b <= {MOST_B:g}", fix="allocator.b=1")
        if self.d is not None and (not isinstance(self.d, int | float) or not 0 <= self.d < 0.5):
            allowed = "0 <= d < 0.5, or null for the release's"
            raise UsageError("d is half the width of the range of sparsities", got=self.d, allowed=allowed)
        if self.solver not in ("exact", "slsqp"):
            raise UsageError("Unknown solver", got=self.solver, allowed="exact, slsqp")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        matrix = context.once(("similarity", self.measure, self.windows), lambda: self._matrix(context))
        shares = total_similarity(matrix)
        importance = [math.exp(-self.b * share) for share in shares]
        d = released_d(sparsity) if self.d is None else self.d
        low, high = bounds(sparsity, d)
        values = solve(importance, layers.block_numels(), sparsity, d, self.solver)
        notes = {
            "d": d,
            "total_similarity": shares,
            "importance": importance,
            "similarity": [[round(value, 4) for value in row] for row in matrix],
        }
        return by_block(layers, values, low=low, high=high, notes=notes)

    def _matrix(self, context: Context) -> list[list[float]]:
        from sparsify.analysis.similarity import block_similarity  # torch, of which the rule itself knows nothing

        walk = context.walk(self.windows)
        matrix: list[list[float]] = block_similarity(
            walk, centred=self.measure == "cka", progress=context.progress
        ).tolist()
        return matrix


def total_similarity(matrix: Sequence[Sequence[float]]) -> list[float]:
    """t: the similarity of each block to all others, as a share of what all blocks have."""
    totals = [math.fsum(row) - row[i] for i, row in enumerate(matrix)]
    whole = math.fsum(totals) or 1.0  # a block alone is like no other
    return [total / whole for total in totals]


def released_d(sparsity: float) -> float:
    """The release's half width of the range of sparsities."""
    return next(d for limit, d in RELEASED_D if sparsity <= limit)


def bounds(sparsity: float, d: float) -> tuple[float, float]:
    """Least and largest sparsity of a block."""
    return max(sparsity - d, 0.0), max(min(sparsity + d, HIGH), sparsity)


def solve(
    importance: Sequence[float], sizes: Sequence[int], sparsity: float, d: float, solver: Solver = "exact"
) -> list[float]:
    """The s_i that minimise sum_i w_i I_i s_i, where sum_i w_i s_i = S sum_i w_i and S - d <= s_i <= S + d.

    Args:
        importance: I_i: what a zero of a block costs.
        sizes: w_i: weights of a block.
        sparsity: S, over all weights.
        d: how far a block may be from it; within [0, 0.99].
        solver: `exact`, where equal importances rank as they come; `slsqp`, as released.

    Raises:
        NumericsError: SLSQP gives up.
    """
    low, high = bounds(sparsity, d)
    if solver == "slsqp":
        return _descended(importance, sizes, sparsity, low, high)
    return _sorted(importance, sizes, sparsity, low, high)


def _sorted(importance: Sequence[float], sizes: Sequence[int], sparsity: float, low: float, high: float) -> list[float]:
    """A fractional knapsack: from the lower bound up, the least important first, while there are zeros left to give."""
    values, left = [low] * len(sizes), (sparsity - low) * sum(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: importance[i]):
        values[i] = min(low + left / sizes[i], high)
        left = max(left - (values[i] - low) * sizes[i], 0.0)
    return values


def _descended(
    importance: Sequence[float], sizes: Sequence[int], sparsity: float, low: float, high: float
) -> list[float]:
    """SLSQP on numerical gradients, from s = 1 brought within the bounds."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, minimize  # a third of a second that a plan has no use for

    share = np.array(sizes) / np.mean(sizes)
    cost = share * np.array(importance)
    solution = minimize(
        lambda s, *_, **__: float(cost @ s),
        x0=np.full(len(sizes), high, dtype=np.float64),
        method="SLSQP",
        bounds=Bounds(low, high),
        constraints=LinearConstraint(share[None] / len(sizes), sparsity, sparsity),
    )
    if not solution.success:
        raise NumericsError("SLSQP found no allocation", got=solution.message, fix="allocator.solver=exact")
    return [min(max(float(value), low), high) for value in solution.x]
