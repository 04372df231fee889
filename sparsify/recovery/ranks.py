"""How LoSA spreads its steps: sparsity, samples, mean rank, and the rank of every block (arXiv 2502.14816)."""

import math
from collections.abc import Sequence

from sparsify.errors import BudgetError, UsageError


def step_sparsity(t: int, T: int, final: float) -> float:
    """Mean sparsity of step t of T: Theta^t = Theta_f - Theta_f (1 - t/T)^3, so that the first step prunes already.

    Source: LoSA, released `lib/prune.py`.
    """
    _check_step(t)
    if t > T:
        raise UsageError("A step is one of T", got=f"t={t} of T={T}", allowed=f"1 to {T}")
    return final - final * (1 - t / T) ** 3


def mean_rank(t: int, first: int = 6, growth: int = 1) -> int:
    """Mean rank of step t: Omega^t = Omega^1 + growth (t - 1); the release grows by one.

    Source: LoSA, released `main.py`.
    """
    _check_step(t)
    return first + growth * (t - 1)


def step_samples(t: int, T: int, samples: int, *, released: bool = False) -> range:
    """Which of the training samples step t sees: n / 2T of them, and the last step the rest; none twice.

    The release (`main.py`, 10,000 samples, T = 5) leaves the first n / 2T out, and its last step begins with those of
    the step before: [1000t, 1000t + 1000) for t < 5, then [4000, 10000).

    Raises:
        UsageError: a step would see none.
    """
    _check_step(t)
    share = samples // (2 * T) if T > 1 else 0
    if samples < 1 or (T > 1 and share < 1):
        raise UsageError(
            "Every step trains on samples of its own", got=f"{samples} samples", allowed=f"at least {2 * T} for T={T}"
        )
    shift = share if released else 0
    if t < T:
        return range((t - 1) * share + shift, t * share + shift)
    return range((T - 1) * share, samples)


def allocate_ranks(
    losses: Sequence[float], mean: float | int, low: int = 1, high: int = 16, *, released: bool = False
) -> list[int]:
    """A rank for every block, in proportion to its reconstruction loss L_i (LoSA, Eq. 7).

    r_i = round(L_i / mean(L) * Omega), halves to even, within [low, high]; then blocks lose one each, the smallest loss
    first, or gain one each, the largest first, until the sum is that of the budget, L * Omega. Blocks of equal loss
    take their turns in order.

    The release (`lib/prune.py`) goes through the blocks once, which may leave the sum short of the budget or beyond it.
    Ours goes through them again and again.

    Args:
        losses: by block, none negative.
        mean: Omega; the budget is rounded to a whole number of components.
        low: of any block.
        high: of any block.
        released: one pass, wherever the sum is then.

    Raises:
        UsageError: losses that are no measure of anything: none, negative, not finite or all zero.
        BudgetError: no ranks within the bounds have that sum.
    """
    wanted, budget = _proportional(losses, mean), round(len(losses) * mean)
    if not released and not len(losses) * low <= budget <= len(losses) * high:
        raise BudgetError(
            "No ranks within the bounds have this mean", got=f"mean={mean}", allowed=f"{low} to {high}, the bounds"
        )
    ranks = [min(max(round(rank), low), high) for rank in wanted]
    while (short := budget - sum(ranks)) != 0:
        _correct(ranks, losses, short, low, high)
        if released:
            break
    return ranks


def _correct(ranks: list[int], losses: Sequence[float], short: int, low: int, high: int) -> None:
    """One pass: a component more or less for each block, until none is missing or too many."""
    step = 1 if short > 0 else -1
    free = [i for i, rank in enumerate(ranks) if low <= rank + step <= high]
    for i in sorted(free, key=lambda i: -step * losses[i])[: abs(short)]:
        ranks[i] += step


def _proportional(losses: Sequence[float], mean: float | int) -> list[float]:
    """L_i / mean(L) * Omega."""
    total = math.fsum(losses)
    if not losses or not math.isfinite(total) or total <= 0 or min(losses) < 0:
        raise UsageError(
            "Ranks are shared out by the blocks' losses",
            got=f"{list(losses)}"[:80],
            allowed="finite losses, none negative, not all zero",
        )
    return [loss / total * mean * len(losses) for loss in losses]


def _check_step(t: int) -> None:
    if t < 1:
        raise UsageError("Steps are counted from one", got=f"t={t}", allowed="1, 2, ...")
