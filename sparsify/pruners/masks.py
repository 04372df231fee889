"""Exact-k selection: which weights stay, by rank and never by threshold, so ties cannot overshoot."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.errors import NumericsError, PatternError, UsageError
from sparsify.types import Target

Group = Literal["row", "matrix", "columns"]
"""Weights that compete with each other: one output row, the whole matrix, or a slab of 128 input columns."""
SLAB = 128
"""Input columns of a slab, as in the released SparseGPT."""


def num_zeros(count: int, sparsity: float) -> int:
    """How many of `count` weights to zero: floor, as the released code does, free of float noise."""
    return math.floor(count * sparsity + 1e-6)


def keep_mask(
    scores: Float[Tensor, "out inp"], target: Target, group: Group = "row", columns: int = SLAB
) -> Bool[Tensor, "out inp"]:
    """Mask of the weights to keep: the highest scores of each comparison group, exactly as many as asked.

    Equal scores are zeroed from the left, as a stable sort would.

    Args:
        scores: importance of each weight, higher is kept.
        target: sparsity or N:M. For N:M the groups are M consecutive inputs of a row, whatever `group` is.
        group: `row` (Wanda), `matrix` (magnitude, RIA) or `columns` (slabs of `columns` inputs over all rows).
        columns: width of a slab for `columns`.

    Raises:
        NumericsError: a score is NaN.
        UsageError: `group` is unknown.
        PatternError: M does not divide the inputs.
    """
    if torch.isnan(scores).any():
        raise NumericsError("Scores cannot be ranked: there is a NaN among them")
    if target.group is not None and target.kept is not None:
        return keep_n_of_m(scores, target.kept, target.group)
    if group == "row":
        return ~_lowest(scores, num_zeros(scores.shape[1], target.sparsity))
    if group == "matrix":
        return keep_jointly(scores, num_zeros(scores.numel(), target.sparsity))
    if group == "columns":
        return _keep_in_slabs(scores, target.sparsity, columns)
    raise UsageError("Unknown comparison group", got=group, allowed="row, matrix, columns")


def _lowest(scores: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """True at the `count` lowest scores of each row, leftmost first among equals."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    kth = _kth_lowest(scores, count)
    below = scores < kth
    ties = scores == kth
    room = count - below.sum(dim=1, keepdim=True)
    return below | (ties & (ties.cumsum(dim=1) <= room))


def _kth_lowest(scores: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "rows 1"]:
    # One long row: radix sort is parallel, kthvalue is not.
    if len(scores) == 1:
        return scores.sort(dim=1).values[:, count - 1 : count]
    return scores.kthvalue(count, dim=1, keepdim=True).values


def keep_jointly(scores: Float[Tensor, "out inp"], count: int) -> Bool[Tensor, "out inp"]:
    """Keep all but the `count` lowest scores of the whole matrix."""
    return ~_lowest(scores.reshape(1, -1), count).reshape(scores.shape)


def _keep_in_slabs(scores: Float[Tensor, "out inp"], sparsity: float, columns: int) -> Bool[Tensor, "out inp"]:
    """Each slab gets its share; the fractions left over by rounding down are carried to the next slab."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    for start, end, count in slab_counts(scores.shape[0], scores.shape[1], sparsity, columns):
        keep[:, start:end] = keep_jointly(scores[:, start:end], count)
    return keep


def slab_counts(rows: int, inputs: int, sparsity: float, columns: int) -> list[tuple[int, int, int]]:
    """(start, end, zeros) of every slab of `columns` inputs; the zeros add up to the matrix' exact count."""
    slabs, done = [], 0
    for start in range(0, inputs, columns):
        end = min(start + columns, inputs)
        total = num_zeros(rows * end, sparsity)
        slabs.append((start, end, total - done))
        done = total
    return slabs


def keep_n_of_m(scores: Float[Tensor, "out inp"], kept: int, group: int) -> Bool[Tensor, "out inp"]:
    """Keep the `kept` highest of every `group` consecutive scores of a row; the leftmost of equal ones go first."""
    rows, inputs = scores.shape
    if inputs % group:
        raise PatternError("M does not divide the inputs", got=f"M = {group}, inputs = {inputs}")
    groups = scores.reshape(-1, group)
    order = groups.argsort(dim=1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(1, order[:, : group - kept], False)
    return keep.reshape(rows, inputs)
