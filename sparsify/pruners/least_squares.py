"""Layer-wise least squares whose targets are outputs of the dense model, in part."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import GRAM, LayerStats, Needs, Statistic
from sparsify.pruners.alps import conjugate_gradients
from sparsify.pruners.base import Pruned
from sparsify.pruners.masks import keep_mask
from sparsify.pruners.normalised import Normalised, normalised
from sparsify.types import Target


@dataclass(frozen=True)
class CrossGram(Statistic):
    """Mean over windows of 2 X~ X^T, fp32, [inp, inp]: inputs in the dense model X~ with those in the pruned one X."""

    reads: ClassVar[Literal["input", "pair", "gradient"]] = "pair"

    def start(self, x: Float[Tensor, "rows inp"]) -> Tensor:
        return torch.zeros(x.shape[1], x.shape[1], device=x.device)

    def fold(
        self,
        state: Any,
        x: Float[Tensor, "rows inp"],
        seen: Tensor,
        total: Tensor,
        dense: Float[Tensor, "rows inp"] | None = None,
    ) -> None:
        assert dense is not None
        scale = (2.0 / total).sqrt().float()
        state.mul_((seen / total).float()).add_((dense * scale).T @ (x * scale))


CROSS = CrossGram()


@dataclass(frozen=True)
class LeastSquares:
    """min over V with a mask of ||V X - Y||^2 + lambda ||V - W||^2, where Y = W (a X~ + (1 - a) X).

    X is what enters the layer behind the pruned part of the model, X~ what enters it in the dense model. At a = 0 a
    layer gives back its own outputs, as in SparseGPT and ALPS; above, it also makes up for what was lost before it. One
    Cholesky factor of the damped Gram matrix H = X X^T + lambda I gives the solution without a mask, V* = T H^-1 with
    T = Y X^T + lambda W; the mask keeps the largest V*_ij^2 / [H^-1]_jj, what the optimal brain surgeon says it costs
    to remove each of them from V* alone; and conjugate gradients, in all rows at once, go from there to the best
    weights on the mask.

    Source: a combination of our own. Saliency: SparseGPT (arXiv 2301.00774), Eq. 3, of all weights at once. Weights on
    the mask: ALPS (arXiv 2406.07831), Algorithm 2. Asymmetric targets: GPTAQ (arXiv 2504.02692), which has a = 1 for
    quantisation; shares between keep one text's errors from being learnt by heart.

    Attributes:
        share: a.
        group: weights that compete: `matrix` or `row`. N:M has its own groups.
        damp: lambda as a fraction of the mean of diag(X X^T).
        refine: steps of the conjugate gradients; 0 leaves V* under the mask.
    """

    share: float = 0.25
    group: Literal["matrix", "row"] = "matrix"
    damp: float = 0.01
    refine: int = 30
    version: int = 1

    def __post_init__(self) -> None:
        if self.group not in ("matrix", "row"):
            raise UsageError("Unknown comparison group", got=self.group, allowed="matrix, row")
        if not (0 <= self.share <= 1 and 0 < self.damp < math.inf and self.refine >= 0):
            raise UsageError(
                "Least squares needs a share of the dense model's outputs, a positive damping and a number of steps",
                got=f"share={self.share}, damp={self.damp}, refine={self.refine}",
                allowed="0 <= share <= 1, damp > 0, refine >= 0",
            )

    @property
    def needs(self) -> Needs:
        """The dense model is carried along only where its outputs are asked for."""
        return frozenset({GRAM, CROSS} if self.share else {GRAM})

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Prune and update; the factor is shared by all layers that read the same input."""
        problem, inverse = stats.once(("least squares", self.damp), lambda: inverted(stats.gram, self.damp))
        aim = problem.scaled(weight) @ problem.gram + self._ahead(weight, problem, stats)
        best = aim @ inverse
        keep = keep_mask(best.square() / inverse.diagonal(), target, self.group)
        found = conjugate_gradients(best * keep, keep, problem.gram, aim, self.refine)
        return Pruned(problem.restored(found, weight, keep), keep)

    def _ahead(
        self, weight: Float[Tensor, "out inp"], problem: Normalised, stats: LayerStats
    ) -> Float[Tensor, "out inp"] | float:
        """What the dense model's outputs add to T, a W (X~ - X) X^T, by the norms of the inputs."""
        if not self.share:
            return 0.0
        scale = problem.scale.masked_fill(problem.scale == 0, 1.0)
        return self.share * (weight.float() @ (stats[CROSS] - stats.gram)) / scale


def inverted(gram: Float[Tensor, "inp inp"], damp: float) -> tuple[Normalised, Float[Tensor, "inp inp"]]:
    """The damped, normalised problem and the inverse of its Gram matrix.

    Raises:
        NumericsError: it is not finite, or not positive definite.
    """
    problem = normalised(gram, damp)
    factor, failed = torch.linalg.cholesky_ex(problem.gram if gram.is_mps else problem.gram.double())
    if failed:
        raise NumericsError(
            "The Gram matrix could not be inverted",
            got=f"{len(gram)} inputs, damp={damp:g}",
            fix="raise pruner.damp, or take more calibration windows",
        )
    return problem, torch.cholesky_inverse(factor).float()
