"""The solver that makes a profile of sparsities meet a budget of zeros, and the rounding of plans to a pattern."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from sparsify.errors import BudgetError, NumericsError, PatternError, UsageError
from sparsify.search.budgets import Budget
from sparsify.types import LayerTable, Ledger, Pattern, SparsityPlan, Target

Adjust = Callable[[float, float], float]


HIGH = 0.99
"""No layer is pruned beyond this unless its rule asks for it."""


def check_room(node: Mapping[str, Any], sparsity: float, num_blocks: int, pattern: Pattern) -> None:
    """Refuse a budget that leaves a search no room to move sparsity between layers.

    Raises:
        UsageError: more zeros than the bound of a layer.
    """
    if sparsity > HIGH:
        raise UsageError("A search moves sparsity between layers", got=f"sparsity={sparsity}", allowed=f"<= {HIGH}")


def shift(value: float, amount: float) -> float:
    """Move a sparsity by the same amount as all others (OWL, ATP)."""
    return value + amount


def scale(value: float, amount: float) -> float:
    """Multiply a sparsity by the same factor as all others (AlphaPruning)."""
    return value * math.exp(amount)


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Mean of values by parameter counts."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def fit_plan(
    layers: LayerTable,
    profile: Mapping[str, float],
    sparsity: float,
    *,
    adjust: Adjust = shift,
    low: float = 0.0,
    high: float = 0.99,
) -> SparsityPlan:
    """Turn a profile into a plan whose parameter-weighted mean is `sparsity`.

    Every value v becomes clip(adjust(v, t), low, high) with one t for all layers, solved so that the
    budget is met; without clipping the differences (or ratios) of the profile are kept.

    Args:
        layers: the model's prunable layers.
        profile: layer name -> sparsity the rule asks for.
        sparsity: parameter-weighted zero fraction to reach, in [0, 1).
        adjust: `shift` or `scale`.
        low: lower bound of a layer's sparsity.
        high: upper bound of a layer's sparsity.

    Raises:
        BudgetError: `sparsity` is outside [low, high], or no adjustment reaches it.
    """
    weights = [layer.numel for layer in layers]
    raw = [profile[layer.name] for layer in layers]
    if not low <= sparsity <= high:
        raise BudgetError(
            "The sparsity cannot be met within the bounds of a layer",
            got=sparsity,
            allowed=f"{low:g} <= sparsity <= {high:g}",
        )
    values = _solve(raw, weights, sparsity, adjust, low, high)
    held = sum(v in (low, high) and r != v for v, r in zip(values, raw, strict=True))
    mean = weighted_mean(values, weights)
    ledger = Ledger(sparsity, weighted_mean(raw, weights), mean, mean, held)
    targets = {layer.name: Target(v) for layer, v in zip(layers, values, strict=True)}
    return SparsityPlan(targets, ledger)


def _solve(
    raw: Sequence[float], weights: Sequence[int], sparsity: float, adjust: Adjust, low: float, high: float
) -> list[float]:
    def clipped(amount: float) -> list[float]:
        return [min(max(adjust(v, amount), low), high) for v in raw]

    def excess(amount: float) -> float:
        return weighted_mean(clipped(amount), weights) - sparsity

    if abs(excess(0.0)) < 1e-12:
        return clipped(0.0)
    reach = 64.0
    below, above = excess(-reach), excess(reach)
    if math.isnan(below) or math.isnan(above):
        raise NumericsError("The allocation rule gave a sparsity that is not a number", got=list(raw))
    if below > 1e-9 or above < -1e-9:
        raise BudgetError(
            "No adjustment of this profile meets the budget",
            got=f"profile from {min(raw):g} to {max(raw):g}, sparsity {sparsity:g}",
            allowed=f"layers within [{low:g}, {high:g}]",
        )
    if below >= 0 or above <= 0:  # the budget is a bound itself
        return clipped(-reach if below >= 0 else reach)
    from scipy.optimize import brentq  # a third of a second that a plan has no use for

    return clipped(brentq(excess, -reach, reach, xtol=1e-15, rtol=1e-15))


def as_is_plan(layers: LayerTable, profile: Mapping[str, float], sparsity: float) -> SparsityPlan:
    """A plan that takes the profile as it stands, clamped to [0, 1] only; the ledger shows the miss."""
    weights = [layer.numel for layer in layers]
    values = [min(max(profile[layer.name], 0.0), 1.0) for layer in layers]
    held = sum(v != profile[layer.name] for layer, v in zip(layers, values, strict=True))
    raw = weighted_mean([profile[layer.name] for layer in layers], weights)
    mean = weighted_mean(values, weights)
    targets = {layer.name: Target(v) for layer, v in zip(layers, values, strict=True)}
    return SparsityPlan(targets, Ledger(sparsity, raw, mean, mean, held))


def check_one_kept(sparsity: float, pattern: Pattern) -> None:
    """Refuse a sparsity that mixed N:M has no room for, since N is at least one.

    Raises:
        BudgetError: with the highest there is.
    """
    if pattern.group is not None and pattern.kept is None and sparsity > 1 - 1 / pattern.group + 1e-9:
        raise BudgetError(
            f"{pattern} keeps at least one weight of every {pattern.group}",
            got=f"sparsity={sparsity:g}",
            allowed=f"sparsity <= {1 - 1 / pattern.group:g}",
            fix=f"pattern=mixed:{2 * pattern.group}, or a lower sparsity",
        )


def apply_pattern(plan: SparsityPlan, layers: LayerTable, pattern: Pattern) -> SparsityPlan:
    """Round a plan to a pattern, keeping the budget.

    Unstructured plans pass through. A fixed N:M needs every layer at 1 - N/M. `mixed:M` rounds each layer to a
    whole number of kept weights in M, so that the total misses the budget by at most half a level of one block.

    Raises:
        BudgetError: more zeros are asked for than keeping one of every M leaves.
        PatternError: M does not divide a layer's inputs, or the plan is not uniform for a fixed N:M.
    """
    if pattern.group is None:
        return plan
    check_widths(layers, pattern.group)
    if pattern.kept is not None:
        _check_uniform(plan, pattern)
        levels = {layer.name: pattern.kept for layer in layers}
    else:
        check_one_kept(plan.ledger.clipped, pattern)
        levels = _round_to_levels(_within_pattern(plan, layers, pattern.group), layers, pattern.group)
    targets = {name: Target(1 - kept / pattern.group, kept, pattern.group) for name, kept in levels.items()}
    mean = weighted_mean([targets[layer.name].sparsity for layer in layers], [layer.numel for layer in layers])
    old = plan.ledger
    ledger = Ledger(old.wanted, old.raw, old.clipped, mean, old.num_clipped)
    return SparsityPlan(targets, ledger, plan.trials, plan.notes)


def _within_pattern(plan: SparsityPlan, layers: LayerTable, group: int) -> SparsityPlan:
    """The plan with no layer beyond keeping one of every `group`; what those layers give up, the others take on."""
    high = 1 - 1 / group
    if max(plan.sparsities().values()) <= high:
        return plan
    return fit_plan(layers, plan.sparsities(), min(plan.ledger.clipped, high), high=high)


def check_widths(layers: LayerTable, group: int) -> None:
    """Refuse an M that does not divide every layer's inputs.

    Raises:
        PatternError: naming the first layer.
    """
    for layer in layers:
        if layer.in_features % group:
            fitting = [m for m in (2, 4, 8, 16, 32) if all(x.in_features % m == 0 for x in layers)]
            raise PatternError(
                f"M does not divide the inputs of {layer.name}",
                got=f"M = {group}, inputs = {layer.in_features}",
                allowed=f"M that divides every layer of this model, such as {fitting}",
                fix="pattern=2:4" if 4 in fitting else "pattern=unstructured",
            )


def _check_uniform(plan: SparsityPlan, pattern: Pattern) -> None:
    implied = pattern.sparsity
    spread = {round(t.sparsity, 9) for t in plan.targets.values()}
    if implied is not None and spread != {round(implied, 9)}:
        raise PatternError(
            f"A fixed {pattern} gives every layer the same sparsity",
            got=f"an allocation from {min(spread):g} to {max(spread):g}",
            allowed=f"allocator=uniform with sparsity={implied:g}",
            fix=f"pattern=mixed:{pattern.group} lets each layer have its own N",
        )


def _round_to_levels(plan: SparsityPlan, layers: LayerTable, group: int) -> dict[str, int]:
    """Kept-of-M for every layer, at least one; layers of a block that share a sparsity stay together.

    Starts from rounding down and moves one bucket by one level at a time, each within one level of its exact value,
    as long as that brings the total nearer to the budget (largest remainder first among equals). Where buckets differ
    in size that may end short of a budget that other roundings meet: then these are taken.
    """
    exact: dict[tuple[int, float], float] = {}
    weight: dict[tuple[int, float], int] = {}
    for layer in layers:
        sparsity = plan.targets[layer.name].sparsity
        key = (layer.block, sparsity)
        exact[key] = group * (1 - sparsity)
        weight[key] = weight.get(key, 0) + layer.numel
    kept = {key: min(max(1, math.floor(value + 1e-9)), group) for key, value in exact.items()}
    missing = sum((exact[key] - kept[key]) * weight[key] for key in exact)
    while move := _best_move(exact, weight, kept, missing, group):
        key, step = move
        kept[key] += step
        missing -= step * weight[key]
    if abs(missing) > 1e-6:
        kept = _nearer(exact, weight, kept, group)
    return {layer.name: kept[layer.block, plan.targets[layer.name].sparsity] for layer in layers}


_Bucket = tuple[int, float]


def _nearer(
    exact: Mapping[_Bucket, float], weight: Mapping[_Bucket, int], kept: dict[_Bucket, int], group: int
) -> dict[_Bucket, int]:
    """The levels moved to the total nearest to the budget that rounding every bucket up or down can give.

    Those move whose other rounding is nearest to their exact value.
    """
    keys = list(exact)
    low = [min(max(1, math.floor(exact[key] + 1e-9)), group) for key in keys]
    high = [min(max(1, math.ceil(exact[key] - 1e-9)), group) for key in keys]
    sizes, now = [weight[key] for key in keys], [kept[key] for key in keys]
    wanted = Fraction(sum(exact[key] * weight[key] for key in keys))
    wanted = max(min(wanted, Fraction(_dot(sizes, high))), Fraction(_dot(sizes, low)))
    budget = Budget.nearest(sizes, low, high, wanted / sum(sizes))
    other = [abs(a + b - n - exact[key]) for key, a, b, n in zip(keys, low, high, now, strict=True)]
    found = budget.settled(now, sorted(range(len(keys)), key=lambda i: other[i]))
    if found is None or abs(_dot(sizes, found) - wanted) >= abs(_dot(sizes, now) - wanted) - Fraction(1, 10**6):
        return kept
    return dict(zip(keys, found, strict=True))


def _dot(sizes: Sequence[int], levels: Sequence[int]) -> int:
    return sum(size * level for size, level in zip(sizes, levels, strict=True))


def _best_move(
    exact: Mapping[_Bucket, float],
    weight: Mapping[_Bucket, int],
    kept: Mapping[_Bucket, int],
    missing: float,
    group: int,
) -> tuple[_Bucket, int] | None:
    """The level change that leaves the least missing, if any leaves less than now."""
    step = 1 if missing > 0 else -1
    moves = [
        (abs(missing - step * weight[key]), abs(kept[key] + step - exact[key]), key)
        for key in exact
        if 1 <= kept[key] + step <= group and abs(kept[key] + step - exact[key]) < 1
    ]
    left, _, key = min(moves, default=(math.inf, 0.0, (0, 0.0)))
    return (key, step) if left < abs(missing) - 1e-6 else None
