"""Absorption coefficients: how much of a disturbance put into a block is left at the last one."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.analysis.perturbation import Drift
from sparsify.errors import UsageError


@dataclass(frozen=True)
class Reading:
    """How a drift becomes coefficients: what the paper leaves open, by name.

    Attributes:
        average: of windows and seeds: `mean_of_ratios` E[R_L / R_l] (as the notes on the paper have it),
            `ratio_of_means` E[R_L] / E[R_l], or `geometric`.
        norm: `token` (relative drift of each token, then the mean) or `frobenius` (of the whole window).
        per_depth: take the (L - l)-th root, so that early blocks do not count more for the depth behind them.
        clip: bound of |u|.
        last: whether the last block, whose r is one by definition, takes part in the mean of u.
    """

    average: Literal["mean_of_ratios", "ratio_of_means", "geometric"] = "mean_of_ratios"
    norm: Literal["token", "frobenius"] = "token"
    per_depth: bool = False
    clip: float = math.log(3)
    last: bool = True

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise UsageError("clip bounds the logarithm of r", got=self.clip, allowed="> 0")


@dataclass(frozen=True)
class Absorption:
    """Coefficients of every block, each [blocks] (arXiv 2606.15161, by second-hand notes).

    Attributes:
        r: R_L / R_l, what is left at the last block of the relative drift at the disturbed one; above one the blocks
            behind amplify, below one they absorb.
        u: log r, clipped.
        D: -(u - mean u): positive where more is absorbed than on average.
        pass_through: ||h_l|| / ||h_L||: what r would be if later blocks handed the disturbance on as it is and only the
            residual stream grew.
        excess: r / pass_through: below one, more is absorbed than by that growth alone.
    """

    r: Float[Tensor, " blocks"]
    u: Float[Tensor, " blocks"]
    D: Float[Tensor, " blocks"]
    pass_through: Float[Tensor, " blocks"]
    excess: Float[Tensor, " blocks"]


def absorption(drift: Drift, reading: Reading | None = None) -> Absorption:
    """Read coefficients off a drift in which every block was disturbed.

    Raises:
        UsageError: some block was not.
    """
    how = reading or Reading()
    blocks = drift.relative.shape[1]
    if drift.injected != tuple(range(blocks)):
        raise UsageError("Coefficients need a disturbance of every block", got=drift.injected, fix="blocks=None")
    r = _ratio(drift.relative if how.norm == "token" else drift.frobenius, how.average)
    if how.per_depth:
        r = r ** (1 / torch.arange(blocks - 1, -1, -1, dtype=r.dtype).clamp_min(1))
    u = r.log().clamp(-how.clip, how.clip)
    counted = u if how.last or blocks == 1 else u[:-1]
    size = drift.norm.mean(1)
    pass_through = size / size[-1]
    return Absorption(r, u, counted.mean() - u, pass_through, r / pass_through)


def _ratio(measure: Float[Tensor, "blocks blocks seeds windows"], average: str) -> Float[Tensor, " blocks"]:
    """R_L / R_l of every block l over seeds and windows."""
    each = torch.arange(len(measure))
    at_block, at_end = measure[each, each].flatten(1), measure[:, -1].flatten(1)
    if average == "ratio_of_means":
        return at_end.mean(1) / at_block.mean(1)
    ratios = at_end / at_block
    return ratios.mean(1) if average == "mean_of_ratios" else ratios.log().mean(1).exp()
