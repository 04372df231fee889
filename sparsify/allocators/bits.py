"""Bits by block from any rule for sparsity: the sparser it would have a block, the fewer. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import groupby

from sparsify.allocators.budget import fit_plan
from sparsify.errors import UsageError
from sparsify.search.budgets import nearest_bit
from sparsify.types import LayerTable

LEVELS = (2, 3, 4, 8)
"""Bits that a weight may have."""
WHOLE = 16
"""Bits of a weight in half precision: what a sparsity is a share of."""


def check_bits(bits: int | float) -> None:
    """Refuse a mean that no levels have.

    Raises:
        UsageError: it is below the fewest bits or above the most.
    """
    if not LEVELS[0] <= bits <= LEVELS[-1]:
        raise UsageError(
            "bits is the number of bits of a weight, or their mean where an allocator shares them out",
            got=f"bits={bits:g}",
            allowed=f"{LEVELS[0]} to {LEVELS[-1]}",
            fix=f"bits={4 if math.isnan(bits) else LEVELS[0] if bits < LEVELS[0] else LEVELS[-1]}",
        )


def sparsity_of(bits: int | float) -> float:
    """The budget that an allocator is asked for: the share of the 16 bits of a weight that goes."""
    return 1 - bits / WHOLE


def shared_bits(layers: LayerTable, sparsities: Mapping[str, float], bits: int | float) -> dict[str, int]:
    """Bits of every layer, one number for each block, whose mean over all weights is `bits`.

    A block that the rule would have at sparsity s at the budget 1 - bits / 16 should get 16 (1 - s) bits, clipped to
    the levels there are and shifted until their mean, weighted by size, is `bits` again. That is rounded to levels so
    that the weighted mean is as near to `bits` as any choice of levels comes (`rounded`).

    Args:
        layers: the prunable matrices.
        sparsities: by layer name; of a block with several their weighted mean counts.
        bits: mean.
    """
    low, high = sparsity_of(LEVELS[-1]), sparsity_of(LEVELS[0])
    plan = fit_plan(layers, sparsities, sparsity_of(bits), low=low, high=high).sparsities()
    sizes = layers.block_numels()
    blocks = [list(block) for _, block in groupby(sorted(layers, key=lambda x: x.block), key=lambda x: x.block)]
    means = [sum(plan[x.name] * x.numel for x in block) / size for block, size in zip(blocks, sizes, strict=True)]
    levels = rounded([WHOLE * (1 - mean) for mean in means], sizes, bits)
    return {layer.name: level for block, level in zip(blocks, levels, strict=True) for layer in block}


def rounded(wanted: Sequence[float], sizes: Sequence[int], mean: int | float) -> list[int]:
    """A level for every block, their mean weighted by size as near to `mean` as it can be.

    Each block takes the level nearest to what it wants, the lower of two as near. What the sum is then off by is paid
    by blocks that take a level next to it instead, those first that lose least by it, as few of the first of them as
    can; where these cannot pay, by levels further off.
    """
    unit = math.gcd(*sizes)
    small = [size // unit for size in sizes]
    total = _nearest_total(small, mean)
    order = [sorted(LEVELS, key=lambda level: (round(abs(level - x), 9), level)) for x in wanted]
    first = [levels[0] for levels in order]
    debt = total - sum(size * level for size, level in zip(small, first, strict=True))
    for count in range(2, len(LEVELS) + 1):
        ranked = sorted(range(len(small)), key=lambda i: _loss(wanted[i], order[i]))
        choices = [levels[:count] for levels in order]
        if (paid := _paid(small, choices, ranked, debt)) is not None:
            return paid
    raise AssertionError("a total that some choice of levels has is reached by all of them")


def _loss(wanted: float, levels: Sequence[int]) -> float:
    """What a block loses by its second choice; where that is the same the first block moves first."""
    return round(abs(levels[1] - wanted) - abs(levels[0] - wanted), 9)


def _nearest_total(sizes: Sequence[int], mean: int | float) -> int:
    """The sum of sizes times levels that is nearest to that of the mean; of two as near the smaller."""
    sums = 1
    for size in sizes:
        sums = _either(sums, [size * (level - LEVELS[0]) for level in LEVELS])
    least = LEVELS[0] * sum(sizes)
    return least + nearest_bit(sums, Fraction(mean) * sum(sizes) - least)


def _paid(sizes: Sequence[int], choices: Sequence[Sequence[int]], order: Sequence[int], debt: int) -> list[int] | None:
    """First choices, but of the first few of `order` others that add up to `debt`; None where no choices do.

    Bit i of `sums[k]` says whether the first k blocks can add i less `below[k]`.
    """
    levels = [choice[0] for choice in choices]
    sums, below = [1], [0]
    for block in order:
        if _has(sums[-1], debt + below[-1]):
            break
        steps = [sizes[block] * (level - levels[block]) for level in choices[block]]
        sums.append(_either(sums[-1], [step - min(steps) for step in steps]))
        below.append(below[-1] - min(steps))
    if not _has(sums[-1], debt + below[-1]):
        return None
    for k in range(len(sums) - 2, -1, -1):
        block = order[k]
        for level in choices[block]:
            step = sizes[block] * (level - choices[block][0])
            if _has(sums[k], debt - step + below[k]):
                levels[block], debt = level, debt - step
                break
    return levels


def _either(sums: int, steps: Sequence[int]) -> int:
    """The sums with one of the steps added to each."""
    found = 0
    for step in steps:
        found |= sums << step
    return found


def _has(bits: int, place: int) -> bool:
    return place >= 0 and bool(bits >> place & 1)
