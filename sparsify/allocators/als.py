"""ALS: blocks whose input says the same as that of many others are pruned more, by a linear program."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import HIGH
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile, by_block
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable


@dataclass(frozen=True)
class ALS(Allocator):
    """Kept shares that maximise the kept independence within the budget.

    Source: Li et al., "Adaptive Layer Sparsity for Large Language Models via Activation Correlation Assessment"
    (NeurIPS 2024), Eq. 4-5 (the released repository is empty):

        RM_ij = ||X_i^T X_j||_F^2 / (||X_i^T X_i||_F ||X_j^T X_j||_F) for the inputs X of blocks i and j
        w_i   = exp(-(sum_j RM_ij - 1) / mean_j RM_ij)
        max sum_i q_i mean_{j >= i} w_j   so that the kept parameters stay within the budget, q_i within bounds

    Such a program puts every block but one on a bound.

    Deviations, most of them because the paper leaves it open: q is the kept share, as the paper's text needs (Appendix
    B.3 calls it the pruned share, for which the budget would never bind). The bounds are the budget +- `reach`: at 50%
    the paper's 30..70%, while at 70% the paper's bounds would leave nothing but uniform. Only blocks are allocated to,
    not the matrices inside a block. No rounding to multiples of 5%, which would miss the budget. The paper normalises
    features without saying how; here every token's vector is scaled to length one.

    Attributes:
        reach: bounds of a block's sparsity are the budget minus and plus this, within [0, 0.99].
        windows: calibration windows that the correlations are taken over (the paper's Appendix E.1 has 2).
        normalise: scale every token's vector to length one first, against a few tokens of huge norm.
    """

    reach: float = 0.2
    windows: int = 2
    normalise: bool = True
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.reach <= 1 or self.windows < 1:
            raise UsageError(
                "ALS's hyper-parameters are out of range",
                got=f"reach={self.reach}, windows={self.windows}",
                allowed="0 <= reach <= 1, windows >= 1",
            )

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        matrix = context.once(("als", self.windows, self.normalise), lambda: self._redundancy(context))
        weights = independence(matrix)
        low, high = max(sparsity - self.reach, 0.0), max(min(sparsity + self.reach, HIGH), sparsity)
        values = solve_program(weights, layers.block_numels(), sparsity, low, high)
        return by_block(layers, values, low=low, high=high, notes={"independence": weights})

    @torch.no_grad()
    def _redundancy(self, context: Context) -> list[list[float]]:
        features, walk = [], context.walk(self.windows)
        for block in range(len(walk.view.blocks)):
            tokens = walk.hidden.flatten(0, -2).float()
            norms = tokens.norm(dim=1, keepdim=True).clamp_min(1e-12)
            features.append(tokens / norms if self.normalise else tokens.clone())
            walk.advance(block)
        pairs: list[list[float]] = redundancy(features).tolist()
        return pairs


def redundancy(features: list[Float[Tensor, "tok dim"]]) -> Float[Tensor, "n n"]:
    """RM of every pair of feature matrices: 1 on the diagonal, 0 where one tells nothing of the other."""
    count = len(features)
    cross = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        row = torch.stack([(features[i].T @ features[j]).double().square().sum() for j in range(i, count)]).cpu()
        cross[i, i:] = row
        cross[i:, i] = row
    own = cross.diagonal().sqrt()
    return cross / (own[:, None] * own[None, :])


def independence(matrix: list[list[float]]) -> list[float]:
    """w_i averaged over the blocks from i on, relative to the largest."""
    rho = torch.tensor(matrix, dtype=torch.float64).sum(dim=1)
    exponent = -(rho - 1) / (rho / len(rho))
    weights = (exponent - exponent.max()).exp()  # a common factor changes no optimum, and keeps them from vanishing
    counts = torch.arange(len(weights), 0, -1)
    means = weights.flip(0).cumsum(0).flip(0) / counts
    relative: list[float] = (means / means.max()).tolist()
    return relative


def solve_program(weights: list[float], numels: list[int], sparsity: float, low: float, high: float) -> list[float]:
    """Sparsities within [low, high] that keep the most weighted share, the parameter-weighted mean being `sparsity`.

    Raises:
        NumericsError: the solver found no solution.
    """
    total = sum(numels)
    solution = linprog(
        [-w for w in weights],
        A_eq=[[n / total for n in numels]],
        b_eq=[1 - sparsity],
        bounds=[(1 - high, 1 - low)] * len(weights),
        method="highs",
    )
    if solution.x is None:
        raise NumericsError("ALS's linear program has no solution", got=solution.message)
    return [1 - float(q) for q in solution.x]
