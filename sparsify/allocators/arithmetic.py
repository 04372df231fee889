"""ATP: sparsity as an arithmetic progression over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sparsify.allocators.base import Allocator, finite_or_none
from sparsify.allocators.profile import Profile, by_block
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable, Pattern

if TYPE_CHECKING:
    from sparsify.allocators.context import Context


@dataclass(frozen=True)
class Arithmetic(Allocator):
    """s_i = S - beta (L-1)/2 + beta (i-1) for block i of L; all layers of a block share s_i.

    Source: ATP (arXiv 2502.14770), Eq. 10, with the search of Algorithm 1 for `beta="auto"`.

    Deviations: the mean is weighted by parameter counts, so blocks of unequal size keep the budget (equal blocks,
    as in every decoder of the paper, are unaffected). The automatic search scores held-out calibration text; the
    release scores the WikiText-2 test set that it then reports. beta = 0 (uniform) is part of the search.

    Attributes:
        beta: difference between neighbouring blocks, or `auto` to search it.
        step: grid of the search.
    """

    beta: float | Literal["auto"] = "auto"
    step: float = 0.002
    version: int = 1

    def __post_init__(self) -> None:
        number = isinstance(self.beta, int | float) and math.isfinite(self.beta)
        if self.beta != "auto" and not number:
            raise UsageError("beta is a finite number or 'auto'", got=repr(self.beta), fix="allocator.beta=auto")
        if not self.step > 0:
            raise UsageError("The step of the beta grid is positive", got=self.step, fix="allocator.step=0.002")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        check_beta({"beta": self.beta}, sparsity, layers.num_blocks, context.pattern)
        if self.beta == "auto":
            return self._search(layers, sparsity, context)
        return by_block(layers, progression(sparsity, float(self.beta), layers.num_blocks), high=1.0)

    def _search(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        trials: list[dict[str, float | None]] = []
        best: tuple[float, float, Profile] | None = None
        grid = beta_grid(sparsity, layers.num_blocks, self.step)
        context.progress("trial", 0, len(grid))
        for beta in grid:
            profile = replace(self, beta=beta).profile(layers, sparsity, context)
            score = finite_or_none(context, profile.fitted(layers, sparsity))
            trials.append({"beta": beta, "heldout_perplexity": score})
            context.progress("trial", len(trials), len(grid))
            if score is not None and (best is None or score < best[0]):
                best = score, beta, profile
        if best is None:
            raise NumericsError("No beta of the grid gave a finite perplexity", got=trials, fix="a lower sparsity")
        _, beta, profile = best
        return replace(profile, trials=tuple(trials), notes={"beta": beta})


@dataclass(frozen=True)
class RelativeProgression(Allocator):
    """An arithmetic progression whose beta is a fraction of its legal maximum: comparable across depths and budgets.

    Attributes:
        fraction: of the legal maximum, in [-1, 1].
    """

    fraction: float = 0.5
    version: int = 1

    def __post_init__(self) -> None:
        if not -1 <= self.fraction <= 1:
            raise UsageError("fraction is a part of the legal maximum of beta", got=self.fraction, allowed="[-1, 1]")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        beta = self.fraction * legal_maximum(sparsity, layers.num_blocks) if layers.num_blocks > 1 else 0.0
        return replace(Arithmetic(beta).profile(layers, sparsity, context), notes={"beta": beta})


def check_beta(node: Mapping[str, Any], sparsity: float, num_blocks: int, pattern: Pattern) -> None:
    """Refuse a beta that would ask a block for a sparsity outside [0, 1].

    Raises:
        UsageError: with the legal range.
    """
    limit = legal_maximum(sparsity, num_blocks)
    beta = node["beta"]
    if isinstance(beta, int | float) and abs(beta) > limit + 1e-12:
        raise UsageError(
            f"beta asks a block for a sparsity outside [0, 1] at sparsity {sparsity:g} over {num_blocks} blocks",
            got=beta,
            allowed=f"-{limit:.6g} <= beta <= {limit:.6g}",
            fix=f"allocator.beta={math.floor(limit * 1000) / 1000:g} or allocator.beta=auto",
        )
    if beta == "auto" and isinstance(step := node.get("step"), int | float) and step > 0:
        beta_grid(sparsity, num_blocks, step)


def progression(sparsity: float, beta: float, num_blocks: int) -> list[float]:
    """Sparsity of each block, first to last, clamped against float noise at the ends."""
    first = sparsity - beta * (num_blocks - 1) / 2
    return [min(max(first + beta * i, 0.0), 1.0) for i in range(num_blocks)]


def legal_maximum(sparsity: float, num_blocks: int) -> float:
    """Largest beta for which every block stays within [0, 1] (ATP, below Eq. 10)."""
    return math.inf if num_blocks < 2 else min(2 * sparsity, 2 * (1 - sparsity)) / (num_blocks - 1)


MOST_POINTS = 10_000


def beta_grid(sparsity: float, num_blocks: int, step: float = 0.002) -> list[float]:
    """0, step, 2 step, ... up to the legal maximum.

    Raises:
        UsageError: so many that no search would end.
    """
    if num_blocks < 2:
        return [0.0]
    points = legal_maximum(sparsity, num_blocks) / step
    if points > MOST_POINTS:
        raise UsageError(
            "The beta grid has too many points, each of which is pruned and measured",
            got=f"{points:.3g} of them (step={step:g})",
            allowed=f"at most {MOST_POINTS}",
            fix="allocator.step=0.002",
        )
    count = math.floor(points + 1e-9)
    return [round(i * step, 12) for i in range(count + 1)]
