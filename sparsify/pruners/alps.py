"""ALPS: ADMM chooses the support, conjugate gradients then find the best weights on it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

EVERY = 3
"""Iterations between two looks at the support."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Eq. 28: from this share of the kept weights changed on, rho grows by this factor."""
PATIENCE, SETTLED = 30, 3e-4
"""After that many iterations the released code stops at this share too."""


@dataclass(frozen=True)
class ALPS:
    """min ||(W - P) X||^2 + lambda ||W - P||^2 with k weights, by splitting P into a dense W and a sparse D (ADMM).

    W = (H W^ - V + rho D) (H + rho I)^-1,  D = P_k(W + V / rho),  V = V + rho (W - D)

    with H damped and its inputs normalised. Every 3 iterations rho grows, the faster the more the support of D changed;
    once it does not, the support of W is fixed and conjugate gradients, projected onto it, find its best weights.

    Source: Meng et al., "ALPS" (NeurIPS 2024, arXiv 2406.07831): Eq. 4, Algorithms 1 and 2, Eq. 27 and 28. As released,
    not as printed: lambda is 0.01 times the mean of diag(H), not its sum; D starts from the k largest of W^; the length
    of a step of the conjugate gradients differs by row; after 30 iterations a change below 0.03% ends ADMM, too. With
    inputs of norm one the preconditioner Diag(H) is the identity.

    Deviations from the release: the number of zeros is exact (there rounded to the nearest); inputs that never occurred
    go first (there their largest weights stay); all steps of the conjugate gradients are made (there the test for an
    early stop reads a residual that is not projected); while rho has not grown yet, a support that stands ends ADMM and
    one that hardly changes (below 0.5%) lets rho grow, as the paper has it (there rho is lowered fivefold instead).

    Attributes:
        group: weights that compete: `matrix` as released, or `row`. N:M has its own groups.
        damp: lambda as a fraction of the mean of diag(H).
        rho: the first penalty.
        iterations: of ADMM, at most; a record says where they were not enough.
        refine: steps of the conjugate gradients.
    """

    needs: ClassVar[Needs] = frozenset({GRAM})
    group: Literal["matrix", "row"] = "matrix"
    damp: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    refine: int = 10
    version: int = 1

    def __post_init__(self) -> None:
        if self.group not in ("matrix", "row"):
            raise UsageError("Unknown comparison group", got=self.group, allowed="matrix, row")
        if not (0 < self.damp < math.inf and 0 < self.rho < math.inf) or self.iterations < 1 or self.refine < 0:
            raise UsageError(
                "ALPS needs a positive damping, penalty and number of iterations",
                got=f"damp={self.damp}, rho={self.rho}, iterations={self.iterations}, refine={self.refine}",
                allowed="damp > 0, rho > 0, iterations >= 1, refine >= 0",
            )

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Prune and update; the eigenvalues are shared by all layers that read the same input."""
        spectrum = stats.once(("alps", self.damp), lambda: decomposed(stats.gram, self.damp))
        problem = spectrum.problem
        dense = problem.scaled(weight)
        select = partial(keep_mask, target=target, group=self.group)
        found, settled = admm(dense, spectrum, select, self.rho, self.iterations)
        keep = select(found.abs())
        best = conjugate_gradients(found * keep, keep, problem.gram, dense @ problem.gram, self.refine)
        notes = {} if settled else {"unsettled": f"the support still changed after {self.iterations} iterations"}
        return Pruned(problem.restored(best, weight, keep), keep, notes)


@dataclass(frozen=True)
class Spectrum:
    """The damped, normalised Gram matrix H = Q M Q^T, for (H + rho I)^-1 at any rho.

    Attributes:
        problem: H, and the scale of the inputs.
        values: M, ascending.
        vectors: Q.
    """

    problem: Normalised
    values: Float[Tensor, " inp"]
    vectors: Float[Tensor, "inp inp"]

    def inverse(self, rho: float) -> Float[Tensor, "inp inp"]:
        """(H + rho I)^-1."""
        return (self.vectors / (self.values + rho)) @ self.vectors.T


def decomposed(gram: Float[Tensor, "inp inp"], damp: float) -> Spectrum:
    """Eigenvalues and eigenvectors of the damped, normalised Gram matrix, in double precision where there is any.

    Raises:
        NumericsError: it is not finite, the decomposition fails, or an eigenvalue is negative beyond rounding.
    """
    problem = normalised(gram, damp)
    tried = f"the eigenvalues of {len(gram)} inputs of norm one, damp={damp:g}"
    try:
        values, vectors = torch.linalg.eigh(problem.gram if gram.is_mps else problem.gram.double())
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericsError("The Gram matrix could not be decomposed", got=tried, fix="raise pruner.damp") from error
    low, high = float(values[0]), float(values[-1])
    if not low >= -1e-4 * high:
        tried += f": {low:g} to {high:g}"
        raise NumericsError("The Gram matrix is not positive", got=tried, fix="raise pruner.damp")
    return Spectrum(problem, values.clamp_min(0).float(), vectors.float())


def admm(
    dense: Float[Tensor, "out inp"], spectrum: Spectrum, select: Callable[[Tensor], Tensor], rho: float, iterations: int
) -> tuple[Float[Tensor, "out inp"], bool]:
    """W of Algorithm 1, and whether its support settled; `select` gives the mask of P_k by magnitudes."""
    aim, inverse = dense @ spectrum.problem.gram, spectrum.inverse(rho)
    before = select(dense.abs())
    kept, work = int(before.sum()), dense
    sparse, dual = dense * before, torch.zeros_like(dense)
    for step in range(1, iterations + 1):
        work = (aim - dual + rho * sparse) @ inverse
        shifted = work + dual / rho
        keep = select(shifted.abs())
        sparse = shifted * keep
        dual = dual + rho * (work - sparse)
        if step % EVERY:
            continue
        changed = int((keep ^ before).sum())
        if changed == 0 or (step > PATIENCE and changed < SETTLED * kept):
            return work, True
        rho, before = grown(rho, changed / max(kept, 1)), keep
        inverse = spectrum.inverse(rho)
    return work, False


def grown(rho: float, share: float) -> float:
    """The next penalty, when this share of the support changed."""
    return rho * next(factor for least, factor in GROWTH if share >= least)


def conjugate_gradients(
    start: Float[Tensor, "out inp"],
    keep: Bool[Tensor, "out inp"],
    gram: Float[Tensor, "inp inp"],
    aim: Float[Tensor, "out inp"],
    steps: int,
) -> Float[Tensor, "out inp"]:
    """Solve W H = aim row by row on the kept weights, all rows at once (Algorithm 2)."""
    solution, residual = start, (aim - start @ gram) * keep
    direction, energy = residual, residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram) * keep
        length = _ratio(energy, (direction * image).sum(dim=1, keepdim=True))
        solution, residual = solution + length * direction, residual - length * image
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction = residual + _ratio(energy, before) * direction
    return solution


def _ratio(above: Float[Tensor, "out 1"], below: Float[Tensor, "out 1"]) -> Float[Tensor, "out 1"]:
    """Their quotient, and 0 in rows that are solved."""
    return torch.where(below > 0, above / below, 0.0)
