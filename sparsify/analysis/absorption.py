"""Absorption coefficients: how much of a disturbance put into a block is left at the last one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.analysis.drift import Drift
from sparsify.errors import NumericsError, UsageError

AVERAGES = ("mean_of_ratios", "ratio_of_means", "geometric", "token_ratios")
NORMS = ("token", "frobenius")


@dataclass(frozen=True)
class Reading:
    """How a drift becomes coefficients: what the paper leaves open, by name.

    Attributes:
        average: how R_L / R_l is averaged. R is a window's mean over tokens in `mean_of_ratios` E[R_L / R_l] over
            windows and seeds, `ratio_of_means` E[R_L] / E[R_l], and `geometric`; `token_ratios` is E[R_L / R_l] over
            tokens too, those that the disturbance moves at all. They agree where all are disturbed alike.
        norm: `token` (relative drift of each token, then the mean) or `frobenius` (of the whole window).
        per_depth: take the (L - l)-th root, so that early blocks do not count more for the depth behind them.
        clip: bound of |u|.
        last: whether the last block, whose r is one by definition, takes part in the mean of u.
    """

    average: Literal["mean_of_ratios", "ratio_of_means", "geometric", "token_ratios"] = "mean_of_ratios"
    norm: Literal["token", "frobenius"] = "token"
    per_depth: bool = False
    clip: float = math.log(3)
    last: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.clip, int | float) or not 0 < self.clip < math.inf:
            raise UsageError("clip bounds the logarithm of r", got=self.clip, allowed="a number above 0")
        for name, value, allowed in (("average", self.average, AVERAGES), ("norm", self.norm, NORMS)):
            if value not in allowed:
                raise UsageError(f"Unknown {name}", got=value, allowed=", ".join(allowed))
        if self.average == "token_ratios" and self.norm != "token":
            raise UsageError("token_ratios are of tokens", got=f"norm={self.norm}", allowed="norm=token")


@dataclass(frozen=True)
class Absorption:
    """Coefficients of every block, each [blocks] (arXiv 2606.15161, by second-hand notes).

    Attributes:
        r: R_L / R_l, what is left at the last block of the relative drift at the disturbed one; above one the blocks
            behind amplify, below one they absorb.
        u: log r, clipped.
        D: -(u - mean u): positive where more is absorbed than on average.
        pass_through: what r would be, read in the same way, if later blocks handed this very disturbance on as it is
            and only the residual stream grew.
        excess: r / pass_through: below one, more is absorbed than by that growth alone.
        stderr: standard error of r over windows (jackknife, all draws of a window together); NaN for a single one.
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
        NumericsError: a disturbance that moves nothing.
    """
    how = reading or Reading()
    blocks = len(drift.norm)
    if drift.injected != tuple(range(blocks)):
        raise UsageError("Coefficients need a disturbance of every block", got=drift.injected, fix="blocks=None")
    if not bool((drift.start > 0).any(-1).all()):
        raise NumericsError("A disturbance moved nothing, so nothing of it can be absorbed", fix="a larger disturbance")
    at_block, at_end, handed_on = _samples(drift, how)
    depth = torch.arange(blocks - 1, -1, -1).clamp_min(1) if how.per_depth else torch.ones(blocks)

    def ratio(ends: Tensor, windows: Tensor) -> Float[Tensor, " blocks"]:
        return _ratio(at_block[..., windows], ends[..., windows], how.average) ** (1 / depth)

    every = torch.arange(at_end.shape[-1])
    r, pass_through = ratio(at_end, every), ratio(handed_on, every)
    u = r.log().clamp(-how.clip, how.clip)
    counted = u if how.last or blocks == 1 else u[:-1]
    stderr = _jackknife(lambda kept: ratio(at_end, kept), len(every))
    return Absorption(r, u, counted.mean() - u, pass_through, r / pass_through, stderr)


def _samples(drift: Drift, how: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """R_l, R_L, and R_L if e_l were handed on, each [blocks, seeds, windows]."""
    if how.average == "token_ratios":
        moved = drift.start > 0
        growth = (drift.norm / drift.norm[-1])[:, None].expand_as(drift.start)  # ||h_l|| / ||h_L||
        here = drift.start.where(moved, 1.0)
        means = [(x * moved).sum(-1) / moved.sum(-1) for x in (moved * 1.0, drift.end / here * growth, growth)]
        return means[0], means[1], means[2]
    each = torch.arange(len(drift.norm))
    measure = drift.relative if how.norm == "token" else drift.frobenius
    return measure[each, each], measure[:, -1], drift.handed_on(how.norm)[:, -1]


def _ratio(
    at_block: Float[Tensor, "blocks seeds windows"], at_end: Float[Tensor, "blocks seeds windows"], average: str
) -> Float[Tensor, " blocks"]:
    """R_L / R_l of every block l over seeds and windows."""
    if average == "ratio_of_means":
        return at_end.mean((1, 2)) / at_block.mean((1, 2))
    ratios = at_end / at_block
    return ratios.log().mean((1, 2)).exp() if average == "geometric" else ratios.mean((1, 2))


def _jackknife(statistic: Callable[[Tensor], Tensor], windows: int) -> Float[Tensor, " blocks"]:
    """Standard error of a statistic of windows: how it moves when each of them is left out."""
    every = torch.arange(windows)
    if windows == 1:
        return torch.full_like(statistic(every), math.nan)
    left = torch.stack([statistic(every[every != i]) for i in range(windows)])
    spread: Tensor = ((windows - 1) * left.var(0, correction=0)).sqrt()
    return spread
