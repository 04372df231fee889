"""GPTQ under a mask, and pruning and quantising in one solve: SparseGPT's walk over columns with rounding in it."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.errors import UsageError
from sparsify.pruners.masks import SLAB, keep_jointly, keep_mask, keep_n_of_m, slab_counts
from sparsify.pruners.sparsegpt import InverseFactor
from sparsify.quantisation.grid import Grid, Precision, nearest
from sparsify.types import Target


class Quantised(NamedTuple):
    """A matrix on its grid.

    Attributes:
        weight: in single precision, zero where `keep` is False, [out, inp].
        keep: the mask.
        grid: its levels.
    """

    weight: Tensor
    keep: Tensor
    grid: Grid


def round_to_nearest(
    weight: Float[Tensor, "out inp"], keep: Bool[Tensor, "out inp"], precision: Precision, stored: torch.dtype
) -> Quantised:
    """Every kept weight at the level nearest to it; nothing makes up for the error."""
    grid = Grid.of(weight.float(), keep, precision, stored)
    return Quantised(grid.rounded(weight).masked_fill(~keep, 0.0), keep, grid)


def quantise(
    weight: Float[Tensor, "out inp"],
    keep: Bool[Tensor, "out inp"],
    factor: InverseFactor,
    precision: Precision,
    stored: torch.dtype,
    order: Tensor | None = None,
) -> Quantised:
    """GPTQ of the kept weights; those that are not are zero and stay zero.

    Column j, first to last: round it to its grid, and spread the error e = (w_j - M_j round(w_j)) / U_jj over the
    columns that come after it, w_k -= e U_jk. What that gives to weights that are not kept is an error when their own
    column comes, and goes on to kept ones: in the end only these have moved. With U as in `InverseFactor`.

    Source: Frantar et al., "GPTQ" (arXiv 2210.17323), Algorithm 1; the mask is SparseGPT's (arXiv 2301.00774, Section
    3.5). Deviations from the release: a group's grid is fitted to the weights with all updates so far (there without
    those of the slab of 128 columns that it lies in); inputs that never occurred are rounded, not zeroed.

    Args:
        weight: zero where `keep` is False.
        keep: the mask.
        factor: of the inputs' inverse Gram matrix, in the order of the walk.
        precision: of the grid.
        stored: dtype of the scales.
        order: the columns in the order of the walk, first to last; None for theirs. Groups are still those of
            neighbours, so with an order their grids are fitted before the walk.
    """
    work, columns = weight.float().clone(), _Columns.of(weight, keep, precision, stored, order)
    order = columns.order
    work, mask = work[:, order], keep[:, order]
    for start, end in _slabs(work.shape[1], _slab_width(work.shape[1], SLAB, precision)):
        upper = factor.upper[start:end, start:end]
        errors = _walk(work[:, start:end], upper, mask[:, start:end], columns, start)
        work[:, end:] -= errors @ factor.upper[start:end, end:]
    back = order.argsort()
    return Quantised(work[:, back], keep, columns.grid())


def prune_and_quantise(
    weight: Float[Tensor, "out inp"],
    target: Target,
    factor: InverseFactor,
    precision: Precision,
    stored: torch.dtype,
    columns: int = SLAB,
) -> Quantised:
    """SparseGPT that rounds the weights that it keeps, in the same walk: e = (w_j - M_j round(w_j)) / U_jj.

    Masks are chosen as SparseGPT does, a slab (or a group of N:M) at a time from the weights as updated so far, so they
    know of the rounding to their left.

    Source: Frantar and Alistarh, "SparseGPT" (arXiv 2301.00774), Section 3.5. The grid of a group is fitted to what is
    kept of it; under N:M to what would be kept if its masks were chosen at its first column; of a whole row to what the
    scores keep of the dense matrix.

    Raises:
        UsageError: groups that N:M's do not fit into.
    """
    check_nesting(target.group, precision.group, weight.shape[1])
    work = weight.float().clone()
    work[:, factor.dead] = 0.0
    first = keep_mask((work / factor.upper.diagonal()).square(), target, "matrix")
    walked = _Columns.of(work, first, precision, stored)
    keep = (~factor.dead).expand_as(work).clone()
    width = _slab_width(work.shape[1], columns, precision, target.group)
    chooses = target if target.group is not None else None  # on the way, group by group
    for start, end, count in slab_counts(work.shape[0], work.shape[1], target.sparsity, width):
        upper, slab = factor.upper[start:end, start:end], work[:, start:end]
        mask = keep_jointly((slab / upper.diagonal()).square(), 0 if chooses else count)
        errors = _walk(slab, upper, mask, walked, start, chooses)
        keep[:, start:end] &= mask
        work[:, end:] -= errors @ factor.upper[start:end, end:]
    return Quantised(work.masked_fill(~keep, 0.0), keep, walked.grid())


def _walk(
    slab: Float[Tensor, "out cols"],
    upper: Float[Tensor, "cols cols"],
    mask: Bool[Tensor, "out cols"],
    columns: "_Columns",
    start: int,
    target: Target | None = None,
) -> Float[Tensor, "out cols"]:
    """Walk the slab's columns in place; returns each column's error over its pivot, for the trailing update."""
    errors, diagonal = torch.zeros_like(slab), upper.diagonal()
    for i in range(slab.shape[1]):
        if columns.begins(start + i):
            group = slice(i, i + columns.width)
            if target is not None:
                _choose(slab, diagonal, mask, group, target)
            columns.fit(start + i, slab[:, group], mask[:, group])
        if target is not None and i % (target.group or 1) == 0:
            _choose(slab, diagonal, mask, slice(i, i + (target.group or 1)), target)
        wanted = slab[:, i].clone()
        new = columns.rounded(start + i, wanted).masked_fill(~mask[:, i], 0.0)
        errors[:, i] = (wanted - new) / diagonal[i]
        slab[:, i:].addr_(errors[:, i], upper[i, i:], alpha=-1)
        slab[:, i] = new
    return errors


def _choose(slab: Tensor, diagonal: Tensor, mask: Tensor, where: slice, target: Target) -> None:
    """N:M masks of some columns, in place, from the weights as they are."""
    scores = (slab[:, where] / diagonal[where]).square()
    mask[:, where] = keep_n_of_m(scores, target.kept or 0, target.group or 1)


@dataclass
class _Columns:
    """The grids of a matrix while its columns are walked: of a group from its first column on, or all fitted before.

    Attributes:
        precision: of the grids.
        stored: dtype of the scales.
        scale: of every group, single precision, [out, groups].
        zero: the same for zero points.
        order: columns in the order of the walk.
        width: of a group.
        live: whether grids are fitted on the way.
        groups: of every column in the order of the walk.
    """

    precision: Precision
    stored: torch.dtype
    scale: Tensor
    zero: Tensor
    order: Tensor
    width: int
    live: bool
    groups: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = (self.order // self.width).tolist()

    @classmethod
    def of(
        cls, weight: Tensor, keep: Tensor, precision: Precision, stored: torch.dtype, order: Tensor | None = None
    ) -> "_Columns":
        """Fitted to the matrix as it is; again on the way, if the walk goes from left to right and a row has groups."""
        grid, inputs = Grid.of(weight.float(), keep, precision, stored), weight.shape[1]
        width, live = precision.width(inputs), order is None and precision.group is not None
        order = torch.arange(inputs, device=weight.device) if order is None else order
        return cls(precision, stored, grid.scale.float(), grid.zero.float(), order, width, live)

    def begins(self, column: int) -> bool:
        """Whether the grid of a group is to be fitted here."""
        return self.live and column % self.width == 0

    def fit(self, column: int, weight: Tensor, keep: Tensor) -> None:
        group = self.groups[column]
        self.scale[:, group], self.zero[:, group] = self.precision.fitted(weight, keep, self.stored)

    def rounded(self, column: int, weight: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        group = self.groups[column]
        scale, zero = self.scale[:, group], self.zero[:, group]
        return (nearest(weight, scale, zero, self.precision.bits, self.stored) - zero) * scale

    def grid(self) -> Grid:
        return Grid.stored(self.precision, self.stored, self.scale, self.zero)


def _slab_width(inputs: int, columns: int, precision: Precision, of_pattern: int | None = None) -> int:
    """About so many columns that no group, of the grid or of N:M, lies in two slabs."""
    unit = math.lcm(precision.width(inputs) if precision.group else 1, of_pattern or 1)
    return max(columns // unit, 1) * unit


def _slabs(inputs: int, width: int) -> list[tuple[int, int]]:
    return [(start, min(start + width, inputs)) for start in range(0, inputs, width)]


def check_nesting(of_pattern: int | None, group: int | None, inputs: int) -> None:
    """Refuse groups of a grid that hold a part of a group of N:M; the row holds all of them.

    Raises:
        UsageError: M does not divide the group.
    """
    if of_pattern is not None and group is not None and group < inputs and group % of_pattern:
        raise UsageError(
            "A group that shares a scale holds whole groups of N:M",
            got=f"group={group}, M={of_pattern}",
            allowed=f"a multiple of {of_pattern}, or null for a row",
            fix=f"method.group={max(group // of_pattern, 1) * of_pattern}",
        )
