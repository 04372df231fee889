"""What an allocator asks for, and the one place where that becomes a plan. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparsify.allocators.budget import HIGH, Adjust, apply_pattern, as_is_plan, fit_plan, shift, weighted_mean
from sparsify.errors import BudgetError
from sparsify.types import LayerTable, Pattern, SparsityPlan

Trial = Mapping[str, float | None]


@dataclass(frozen=True)
class Profile:
    """A sparsity for every layer as a rule has it, before the budget is met.

    Attributes:
        values: sparsity by layer name.
        low: no layer is pruned less than this.
        high: no layer is pruned more.
        adjust: how all values move until the budget is met: `shift` (OWL, ATP) or `scale` (AlphaPruning).
        exact: whether they move. False is for released rules that miss their budget, for comparison only.
        levels: whether the values are whole levels of the pattern already, as near to the budget as those come; a
            pattern then rounds nothing.
        notes: what the record keeps: JSON-ready.
        trials: what a search tried, in order.
    """

    values: Mapping[str, float]
    low: float = 0.0
    high: float = HIGH
    adjust: Adjust = shift
    exact: bool = True
    levels: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()

    def fitted(self, layers: LayerTable, sparsity: float, pattern: Pattern | None = None) -> SparsityPlan:
        """The plan: values moved and clipped until their parameter-weighted mean is the budget, rounded to the pattern.

        Raises:
            BudgetError: a layer without a value or with one that is no layer's, or a budget out of reach.
            PatternError: a pattern that does not fit the layers.
        """
        if odd := {layer.name for layer in layers} ^ set(self.values):
            raise BudgetError("A profile has a value for every layer", got=f"{sorted(odd)[0]} on one side only")
        if self.exact and not (self.levels and pattern and pattern.group):
            plan = fit_plan(layers, self.values, sparsity, adjust=self.adjust, low=self.low, high=self.high)
        else:
            plan = as_is_plan(layers, self.values, sparsity)
        plan = apply_pattern(replace(plan, notes=self.notes, trials=self.trials), layers, pattern or Pattern())
        if self.exact:
            _check_budget(plan, layers, sparsity, pattern or Pattern())
        return plan


def _check_budget(plan: SparsityPlan, layers: LayerTable, sparsity: float, pattern: Pattern) -> None:
    """What was promised is counted, for every allocator alike; rounding may miss by one level of the largest block."""
    mean = weighted_mean([plan.targets[layer.name].sparsity for layer in layers], [layer.numel for layer in layers])
    level = max(layers.block_numels()) / layers.numel / pattern.group if pattern.group else 0.0
    if abs(mean - sparsity) > level + 1e-9:
        raise BudgetError("The plan misses its budget", got=f"{mean:.6f}", allowed=f"{sparsity:g} +- {level:.2g}")


def by_block(layers: LayerTable, values: list[float], **options: Any) -> Profile:
    """A profile that gives every layer the value of its block, first block to last."""
    return Profile(layers.spread(values), **options)
