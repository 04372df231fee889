"""SparseGPT: remove weights column by column and let the later columns make up for it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.errors import NumericsError, UsageError
from sparsify.model.cuda_graph import Replay, captured
from sparsify.model.statistics import GRAM, LayerStats, Needs
from sparsify.pruners.base import Pruned
from sparsify.pruners.masks import keep_jointly, keep_n_of_m, slab_counts
from sparsify.types import Target


@dataclass(frozen=True)
class SparseGPT:
    """Optimal-brain-surgeon update in slabs of columns, with an adaptive mask per slab.

    Source: Frantar and Alistarh, "SparseGPT" (arXiv 2301.00774), Algorithm 1. Inside a slab of `columns` inputs the
    lowest w^2 / diag(H^-1)^2 over all rows go; each removed weight's error is spread over the inputs to its right.

    Deviations: the number of zeros is exact (the release zeroes one more per slab and all ties with it); when the
    Cholesky factorisation fails the damping is multiplied by ten and the value used is recorded. `rule="released"`
    zeroes what the release zeroes, in the release's order of operations, for comparison with it.

    Attributes:
        damp: fraction of the mean of diag(H) added to the diagonal.
        columns: width of a slab.
        rule: `exact`, or `released` (one zero more per slab).
    """

    needs: ClassVar[Needs] = frozenset({GRAM})
    damp: float = 0.01
    columns: int = 128
    rule: Literal["exact", "released"] = "exact"
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.damp < float("inf") or self.columns < 1:
            raise UsageError(
                "SparseGPT needs a positive damping and slab width",
                got=f"damp={self.damp}, columns={self.columns}",
                allowed="damp > 0, columns >= 1",
            )
        if self.rule not in ("exact", "released"):
            raise UsageError("Unknown counting rule", got=self.rule, allowed="exact, released")

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Prune and update; the factorisation is shared by all layers that read the same input."""
        factor = stats.once(("inverse", self.damp), lambda: inverse_factor(stats.gram, self.damp))
        new, keep = obs_prune(weight.float(), factor, target, self.columns, self.rule == "released")
        notes = {"damp": factor.damp} if factor.damp != self.damp else {}
        return Pruned(new, keep, notes)


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor of the inverse damped Gram matrix.

    Attributes:
        upper: U with H^-1 = U^T U, [inp, inp].
        dead: inputs that were zero on all calibration text.
        damp: damping that made the factorisation succeed.
    """

    upper: Float[Tensor, "inp inp"]
    dead: Bool[Tensor, " inp"]
    damp: float


def inverse_factor(gram: Float[Tensor, "inp inp"], damp: float) -> InverseFactor:
    """Factorise (H + damp * mean(diag H) * I)^-1, raising the damping tenfold while it fails and is at most 1.

    Raises:
        NumericsError: H is not finite, or no damping up to 1 makes it positive definite.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = diagonal.mean()
    if not torch.isfinite(hessian).all():
        raise NumericsError("The Gram matrix of a layer's inputs is not finite", fix="use dtype=float32")
    added, level = 0.0, damp
    while level <= max(1.0, damp):
        diagonal += (level - added) * mean
        added = level
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return InverseFactor(upper, dead, level)
        level *= 10
    raise NumericsError("The Gram matrix could not be factorised", got=f"damping up to {added:g}", allowed="<= 1")


def obs_prune(
    weight: Float[Tensor, "out inp"], factor: InverseFactor, target: Target, columns: int, released: bool = False
) -> tuple[Float[Tensor, "out inp"], Bool[Tensor, "out inp"]]:
    """New weight and mask: slab by slab, then one product carries the slab's error to the rest."""
    if target.group is not None:
        columns = max(columns // target.group, 1) * target.group  # a group never straddles two slabs
    work = weight.clone()
    work[:, factor.dead] = 0.0
    keep = (~factor.dead).expand_as(work).clone()
    walk = eliminate_replayed if work.is_cuda else eliminate
    for start, end, count in slab_counts(work.shape[0], work.shape[1], target.sparsity, columns):
        upper = factor.upper[start:end, start:end]
        slab = work[:, start:end]
        if target.group is None:
            if released:
                mask = released_mask(slab, upper, target.sparsity)
            else:
                mask = keep_jointly((slab / upper.diagonal()).square(), count)
            errors = walk(slab, upper, mask)
        else:
            mask = torch.ones_like(slab, dtype=torch.bool)
            errors = walk(slab, upper, mask, target)
        keep[:, start:end] &= mask
        work[:, end:] -= errors @ factor.upper[start:end, end:]
    return work, keep


def released_mask(
    slab: Float[Tensor, "out cols"], upper: Float[Tensor, "cols cols"], sparsity: float
) -> Bool[Tensor, "out cols"]:
    """What the release keeps of a slab: all above the score at position int(n s), so one or more too few."""
    scores = slab**2 / upper.diagonal().reshape(1, -1) ** 2
    place = min(int(scores.numel() * sparsity), scores.numel() - 1)
    return scores > scores.flatten().sort().values[place]


def eliminate(
    slab: Float[Tensor, "out cols"],
    upper: Float[Tensor, "cols cols"],
    mask: Bool[Tensor, "out cols"],
    target: Target | None = None,
) -> Float[Tensor, "out cols"]:
    """Walk the slab's columns in place; returns each column's error over its pivot, for the trailing update.

    With an N:M target the mask of a group is chosen, in place, when its first column is reached, from the weights as
    updated so far.
    """
    errors = torch.zeros_like(slab)
    diagonal = upper.diagonal()
    for i in range(slab.shape[1]):
        if target is not None and target.kept and target.group and i % target.group == 0:
            group = slice(i, i + target.group)
            mask[:, group] = keep_n_of_m((slab[:, group] / diagonal[group]).square(), target.kept, target.group)
        errors[:, i] = slab[:, i].masked_fill(mask[:, i], 0.0) / diagonal[i]
        slab[:, i:].addr_(errors[:, i], upper[i, i:], alpha=-1)
    slab.masked_fill_(~mask, 0.0)
    return errors


def eliminate_replayed(
    slab: Float[Tensor, "out cols"],
    upper: Float[Tensor, "cols cols"],
    mask: Bool[Tensor, "out cols"],
    target: Target | None = None,
) -> Float[Tensor, "out cols"]:
    """`eliminate` on a CUDA device, captured once for each shape: its 500 small launches become one."""
    walk = _captured_walk(slab.shape, slab.device, target and (target.kept, target.group))
    if walk is None:
        return eliminate(slab, upper, mask, target)
    errors, new, chosen = walk(slab, upper, mask)
    slab.copy_(new)
    mask.copy_(chosen)
    return errors


@lru_cache(maxsize=64)
def _captured_walk(
    shape: torch.Size, device: torch.device, levels: tuple[int | None, int | None] | None
) -> Replay | None:
    target = None if levels is None else Target(0.0, *levels)

    def walk(slab: Tensor, upper: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return eliminate(slab, upper, mask, target), slab, mask

    columns = shape[1]
    examples = torch.ones(shape, device=device), torch.eye(columns, device=device)
    return captured(walk, *examples, torch.ones(shape, dtype=torch.bool, device=device))
