"""ATP's Theorem 3.5 on a real model: of two neighbouring blocks, should the later one be the sparser?

The theorem takes E_{i+1} = c E_i + f(s_{i+1}) with c > 1 and one increasing f for all blocks. Then giving the pair
(k, k+1) its sparsities in ascending order makes E_k + E_{k+1} smaller by c (f(high) - f(low)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest

from sparsify.analysis.error_growth import Growth

ERRORS = ("absolute", "absolute_median", "relative")


@dataclass(frozen=True)
class Verdict:
    """In how many pairs the ascending order was the better one.

    Attributes:
        measure: what was lower.
        wins: pairs in which it was lower in ascending order.
        pairs: pairs in all.
        low: lower end of the 95% Clopper-Pearson interval of the share, as if pairs were independent.
        high: its upper end.
        change: median over pairs of descending / ascending - 1.
    """

    measure: str
    wins: int
    pairs: int
    low: float
    high: float
    change: float


@dataclass(frozen=True)
class Recursion:
    """E_{i+1} = c E_i + a_{i+1} + b s_{i+1}, fitted over profiles with errors in units of the block's mean error.

    Every block has an intercept of its own: within a profile that rises with depth, sparsity and depth are one thing.

    Attributes:
        c: as in the theorem.
        b: slope of f; the theorem wants it positive.
        explained: share of the variation between profiles that the fit explains.
    """

    c: float
    b: float
    explained: float


def orders(profile: Sequence[float], block: int, gap: float | None = None) -> tuple[tuple[float, ...], ...]:
    """The profile with blocks `block` and `block + 1` in ascending and in descending order; the others stay.

    Args:
        profile: sparsity by block.
        block: first block of the pair.
        gap: difference to give the pair around its mean; None for the one it has.
    """
    low, high = sorted(profile[block : block + 2])
    if gap is not None:
        low, high = (low + high - gap) / 2, (low + high + gap) / 2
    head, tail = tuple(profile[:block]), tuple(profile[block + 2 :])
    return (*head, low, high, *tail), (*head, high, low, *tail)


def summed_errors(growth: Growth, block: int) -> dict[str, float]:
    """Errors summed over the pair that starts at `block` and over all blocks, and the relative error at the end."""
    curves = {name: getattr(growth, name).mean(1) for name in ERRORS}
    sums = {f"pair {name}": float(curve[block : block + 2].sum()) for name, curve in curves.items()}
    sums |= {f"all {name}": float(curve.sum()) for name, curve in curves.items()}
    return sums | {"last relative": float(curves["relative"][-1])}


def verdict(measure: str, ascending: Sequence[float], descending: Sequence[float]) -> Verdict:
    """Count the pairs whose ascending order is lower in a measure; a tie is no win."""
    wins = sum(a < d for a, d in zip(ascending, descending, strict=True))
    share = binomtest(wins, len(ascending)).proportion_ci()
    changes = torch.tensor([d / a - 1 for a, d in zip(ascending, descending, strict=True)])
    return Verdict(measure, wins, len(ascending), float(share.low), float(share.high), float(changes.quantile(0.5)))


def fit_recursion(runs: Mapping[tuple[float, ...], Growth], error: str) -> Recursion:
    """The theorem's recursion, fitted to what changes in a block from run to run.

    Args:
        runs: growth of each profile that was measured; two or more.
        error: one of `ERRORS`.
    """
    errors = torch.stack([getattr(growth, error).mean(1) for growth in runs.values()])
    sparsity = torch.tensor(list(runs), dtype=errors.dtype)
    unit = errors[:, 1:].mean(0)
    given, made, wanted = (
        ((values - values.mean(0)) / unit).flatten() for values in (errors[:, :-1], errors[:, 1:], sparsity[:, 1:])
    )
    x = torch.stack([given, wanted], 1)
    scale = x.norm(dim=0)
    solution = torch.linalg.lstsq(x / scale, made[:, None], driver="gelsd").solution[:, 0] / scale
    left = made - x @ solution
    return Recursion(float(solution[0]), float(solution[1]), float(1 - left.square().sum() / made.square().sum()))
