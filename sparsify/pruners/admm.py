"""ADMM with a mask that grows: weights are updated while more and more of them go."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import GRAM, LayerStats, Needs
from sparsify.pruners.base import Pruned
from sparsify.pruners.masks import keep_mask
from sparsify.pruners.normalised import Normalised, normalised
from sparsify.types import Target


@dataclass(frozen=True)
class ADMM:
    """min ||(W^ - W) X||^2 with W zero outside a mask M, by ADMM, while M shrinks to the target.

    Z = M * (W + U),  U = U + W - Z,  W = (W^ H + rho (Z - U)) (H + rho I)^-1

    with inputs normalised and H damped; the mask of step t of the first `ramp` keeps the largest |W + U| at sparsity
    s (1 - (1 - t / ramp)^3), and stays for the other steps. For N:M the N largest of each group are safe, and the same
    share of all others goes.

    Source: Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR 2024, arXiv 2401.02938), and
    its released code (constants, N:M, order of the updates).

    Deviations from the release: masks are per row by default (its `per_out`), where it compares over the matrix, then
    at the full sparsity from the first step on (here `group=matrix gradual=false`). The number of zeros is exact (with
    `per_out` ties are kept), inputs that never occurred go first, and N:M is any (there 2:4, whatever is asked).

    Attributes:
        group: weights that compete: `row` or `matrix`. Of N:M: over what the share of unsafe weights is taken.
        gradual: whether sparsity grows over the ramp; otherwise the mask is chosen anew at every step of it.
        damp: ridge on the normalised H, whose diagonal is one.
        rho: the penalty.
        ramp: steps that choose the mask.
        iterations: all steps.
    """

    needs: ClassVar[Needs] = frozenset({GRAM})
    group: Literal["row", "matrix"] = "row"
    gradual: bool = True
    damp: float = 0.1
    rho: float = 1.0
    ramp: int = 15
    iterations: int = 20
    version: int = 1

    def __post_init__(self) -> None:
        if self.group not in ("matrix", "row"):
            raise UsageError("Unknown comparison group", got=self.group, allowed="row, matrix")
        if not (0 <= self.damp < math.inf and 0 < self.rho < math.inf) or not 1 <= self.ramp <= self.iterations:
            raise UsageError(
                "ADMM needs a positive penalty, and a ramp within its iterations",
                got=f"damp={self.damp}, rho={self.rho}, ramp={self.ramp}, iterations={self.iterations}",
                allowed="damp >= 0, rho > 0, 1 <= ramp <= iterations",
            )

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Prune and update; the inverse is shared by all layers that read the same input."""
        system = stats.once(("admm", self.damp, self.rho), lambda: inverted(stats.gram, self.damp, self.rho))
        dense = system.problem.scaled(weight)
        work, keep = updated(dense, system, self.rho, self.iterations, lambda step, w: self._mask(step, w, target))
        return Pruned(system.problem.restored(work, weight, keep), keep)

    def _mask(self, step: int, work: Float[Tensor, "out inp"], target: Target) -> Bool[Tensor, "out inp"] | None:
        """The mask of a step; None after the ramp: it stays."""
        if step > self.ramp:
            return None
        share = 1 - (1 - step / self.ramp) ** 3 if self.gradual else 1.0
        return partial_mask(work.abs(), target, share, self.group)


@dataclass(frozen=True)
class Inverse:
    """H with its ridge, and (H + rho I)^-1.

    Attributes:
        problem: the scale of the inputs, and H with its ridge.
        inverse: of that, with the penalty.
    """

    problem: Normalised
    inverse: Float[Tensor, "inp inp"]


def inverted(gram: Float[Tensor, "inp inp"], damp: float, rho: float) -> Inverse:
    """Normalise, add `damp` times the mean of the diagonal, and invert with `rho` on the diagonal.

    Raises:
        NumericsError: H is not finite, or not positive definite with ridge and penalty.
    """
    problem = normalised(gram)
    diagonal = problem.gram.diagonal()
    diagonal += damp * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(problem.gram + rho * torch.eye(len(gram), device=gram.device))
    if failed:
        tried = f"Cholesky of {len(gram)} inputs of norm one with damp={damp:g} and rho={rho:g}"
        raise NumericsError("The Gram matrix could not be factorised", got=tried, fix="raise pruner.damp")
    return Inverse(problem, torch.cholesky_inverse(lower))


def partial_mask(
    scores: Float[Tensor, "out inp"], target: Target, share: float, group: Literal["row", "matrix"]
) -> Bool[Tensor, "out inp"]:
    """What is kept when this share of the zeros is made."""
    if target.group is None or target.kept is None:
        return keep_mask(scores, Target(share * target.sparsity), group)
    safe = scores.masked_fill(keep_mask(scores, target), math.inf)
    return keep_mask(safe, Target(share * (1 - target.kept / target.group)), group)


def updated(
    dense: Float[Tensor, "out inp"],
    system: Inverse,
    rho: float,
    iterations: int,
    choose: Callable[[int, Tensor], Tensor | None],
) -> tuple[Float[Tensor, "out inp"], Bool[Tensor, "out inp"]]:
    """W after the last step, and the last mask, where U is zero.

    Args:
        dense: W^ with its inputs normalised.
        system: H, and (H + rho I)^-1.
        rho: the penalty.
        iterations: steps.
        choose: the mask of step 1, 2, ..., given that and W + U; None for the mask before.
    """
    aim = dense @ system.problem.gram
    work, dual = dense, torch.zeros_like(dense)
    keep = torch.ones_like(dense, dtype=torch.bool)
    for step in range(1, iterations + 1):
        chosen = choose(step, work + dual)
        keep = keep if chosen is None else chosen
        sparse = (work + dual) * keep
        dual = dual + work - sparse
        work = (aim + rho * (sparse - dual)) @ system.inverse
    return work, keep
