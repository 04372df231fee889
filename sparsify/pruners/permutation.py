"""Which inputs share a group of M: orders of a matrix' columns under which N:M loses less."""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CHUNK = 2**27
"""Elements of the largest temporary."""


def dealt(scores: Float[Tensor, "out inp"], group: int) -> Int[Tensor, " inp"]:
    """Columns by falling sum of scores, dealt to the groups back and forth, so that every group has its share.

    Source: RIA (ICLR 2024), Section 3.3, "heuristic channel reallocation".

    Args:
        scores: importance of each weight.
        group: M, which divides the columns.

    Returns:
        The columns in their new order: the first M of them are the first group.
    """
    hands = scores.sum(dim=0).argsort(descending=True, stable=True).reshape(group, -1)
    hands[1::2] = hands[1::2].flip(1)
    return hands.T.reshape(-1)


def assigned(
    scores: Float[Tensor, "out inp"], order: Int[Tensor, " inp"], kept: int, group: int
) -> Int[Tensor, " inp"]:
    """An order refined place by place: one column of every group is taken out, and all are given back where they add
    most to the scores that N of M keeps. No step lowers that sum.

    Source: RIA (ICLR 2024), Section 3.3, "linear sum assignment"; the optimum of each step is scipy's.

    Args:
        scores: importance of each weight, non-negative.
        order: to start from.
        kept: N.
        group: M.
    """
    groups = order.reshape(-1, group).clone()
    if kept == group:
        return order
    for place in range(group):
        others = groups[:, [i for i in range(group) if i != place]]
        gain = _gains(scores, groups[:, place], others, kept)
        column, row = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
        groups[torch.as_tensor(row, device=groups.device), place] = groups[
            torch.as_tensor(column, device=groups.device), place
        ]
    return groups.reshape(-1)


def _gains(
    scores: Float[Tensor, "out inp"], columns: Int[Tensor, " groups"], others: Int[Tensor, "groups rest"], kept: int
) -> Float[Tensor, "groups groups"]:
    """[c, g]: by how much the kept scores of group g grow when column c joins its other columns.

    With it N are kept of M, without it N of M - 1: it adds what it has above the N-th of the others.
    """
    nth = scores[:, others].topk(kept, dim=2).values[..., -1]  # [out, groups]
    joining = scores[:, columns].T  # [groups, out]
    step = max(1, CHUNK // nth.numel())
    parts = [(part[:, :, None] - nth).clamp_min(0).sum(dim=1) for part in joining.split(step)]
    return torch.cat(parts)
