"""Absorption coefficients: how much of a disturbance put into a block is left at the last one."""

import math
from collections.abc import Callable
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
        pass_through: ||h_l|| / ||h_L||, by the norm of the reading: what r would be if later blocks handed the
            disturbance on as it is and only the residual stream grew.
        excess: r / pass_through: below one, more is absorbed than by that growth alone.
        stderr: standard error of r over windows and seeds (jackknife); not a number for a single one.
    """

    r: Float[Tensor, " blocks"]
    u: Float[Tensor, " blocks"]
    D: Float[Tensor, " blocks"]
    pass_through: Float[Tensor, " blocks"]
    excess: Float[Tensor, " blocks"]
    stderr: Float[Tensor, " blocks"]


def absorption(drift: Drift, reading: Reading | None = None) -> Absorption:
    """Read coefficients off a drift in which every block was disturbed.

    Raises:
        UsageError: some block was not.
    """
    how = reading or Reading()
    blocks = drift.relative.shape[1]
    if drift.injected != tuple(range(blocks)):
        raise UsageError("Coefficients need a disturbance of every block", got=drift.injected, fix="blocks=None")
    each = torch.arange(blocks)
    measure = (drift.relative if how.norm == "token" else drift.frobenius).flatten(2)
    at_block, at_end = measure[each, each], measure[:, -1]
    roots = 1 / (blocks - 1 - each).clamp_min(1) if how.per_depth else torch.ones(blocks)
    r = _ratio(at_block, at_end, how.average) ** roots
    u = r.log().clamp(-how.clip, how.clip)
    counted = u if how.last or blocks == 1 else u[:-1]
    pass_through = _growth(drift.norm, how.norm)
    stderr = _jackknife(lambda kept: _ratio(at_block[:, kept], at_end[:, kept], how.average) ** roots, at_end.shape[1])
    return Absorption(r, u, counted.mean() - u, pass_through, r / pass_through, stderr)


def _ratio(
    at_block: Float[Tensor, "blocks samples"], at_end: Float[Tensor, "blocks samples"], average: str
) -> Float[Tensor, " blocks"]:
    """R_L / R_l of every block l over samples, the windows and seeds."""
    if average == "ratio_of_means":
        return at_end.mean(1) / at_block.mean(1)
    ratios = at_end / at_block
    return ratios.mean(1) if average == "mean_of_ratios" else ratios.log().mean(1).exp()


def _growth(norm: Float[Tensor, "blocks windows seq"], how: str) -> Float[Tensor, " blocks"]:
    """||h_l|| / ||h_L||: of each token, then the mean; or of the windows' states as matrices."""
    size = norm if how == "token" else norm.square().sum(-1, keepdim=True).sqrt()
    return (size / size[-1]).mean((1, 2))


def _jackknife(statistic: Callable[[Tensor], Tensor], samples: int) -> Float[Tensor, " blocks"]:
    """Standard error of a statistic of samples: how it moves when each of them is left out."""
    everything = torch.arange(samples)
    if samples == 1:
        return torch.full_like(statistic(everything), math.nan)
    left = torch.stack([statistic(everything[everything != i]) for i in range(samples)])
    spread: Tensor = ((samples - 1) * left.var(0, correction=0)).sqrt()
    return spread
