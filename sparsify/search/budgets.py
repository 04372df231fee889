"""Whole numbers of levels for groups of unequal size, their weighted sum held exactly. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from sparsify.errors import BudgetError

Genome = tuple[int, ...]
"""A level for every gene."""


@dataclass(frozen=True)
class Budget:
    """Which genomes are allowed: levels within bounds whose sum, weighted by size, is one number.

    Attributes:
        sizes: what a level of each gene counts for (weights, or weights over a common divisor).
        low: lowest level of each gene.
        high: highest level.
        total: what sum(sizes * levels) must be, exactly.
    """

    sizes: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    total: int

    @classmethod
    def nearest(cls, sizes: Sequence[int], low: Sequence[int], high: Sequence[int], mean: Fraction) -> Budget:
        """The budget whose mean level, weighted by size, comes as near to `mean` as whole levels can.

        Every genome then has this sum and no other. Of two sums as near the smaller one (fewer weights kept) is taken.

        Raises:
            BudgetError: `mean` is outside the means of the bounds.
        """
        unit = math.gcd(*sizes)
        small = tuple(size // unit for size in sizes)
        least, most = _sum(small, low), _sum(small, high)
        wanted = mean * sum(small)
        if not least <= wanted <= most:
            raise BudgetError(
                "The budget cannot be met within the bounds of a gene",
                got=f"a mean level of {float(mean):g}",
                allowed=f"{least / sum(small):g} to {most / sum(small):g}",
            )
        rooms: Counter[int] = Counter()
        for size, a, b in zip(small, low, high, strict=True):
            rooms[size] += b - a
        return cls(small, tuple(low), tuple(high), least + nearest_bit(_sums(rooms), wanted - least))

    def __len__(self) -> int:
        return len(self.sizes)

    def debt(self, levels: Sequence[int]) -> int:
        """By how much the levels' sum falls short of the total."""
        return self.total - _sum(self.sizes, levels)

    def holds(self, levels: Sequence[int]) -> bool:
        """Whether the levels are within their bounds and on the budget."""
        within = all(a <= n <= b for a, n, b in zip(self.low, levels, self.high, strict=True))
        return within and self.debt(levels) == 0

    def clipped(self, levels: Sequence[int]) -> Genome:
        """The levels moved into their bounds, the sum whatever it is."""
        return tuple(min(max(n, a), b) for a, n, b in zip(self.low, levels, self.high, strict=True))

    def settled(self, levels: Sequence[int], order: Sequence[int]) -> Genome | None:
        """The levels moved onto the budget by genes of `order`, as few of the first of them as can.

        Each gene moves by one level at most, if that can be; else by two, four, ... With all genes in `order` there is
        always a way.

        Args:
            levels: within the bounds.
            order: genes that may move, the first ones first.

        Returns:
            The genome; None where these genes cannot pay.
        """
        debt, window = self.debt(levels), 1
        widest = max((self.high[gene] - self.low[gene] for gene in order), default=0)
        while True:
            found = self._paid(levels, debt, order, window)
            if found is not None or window >= widest:
                return found
            window *= 2

    def _paid(self, levels: Sequence[int], debt: int, order: Sequence[int], window: int) -> Genome | None:
        """The levels after moves of at most `window` that add up to `debt`: subset sums of a growing set of genes.

        Bit i of `sums[k]` says whether the first k genes can add i less `below[k]`.
        """
        if debt == 0:
            return tuple(levels)
        sums, below = [1], [0]
        for gene in order:
            down, up = self._room(levels, gene, window)
            sums.append(_smeared(sums[-1], self.sizes[gene], down + up))
            below.append(below[-1] + down * self.sizes[gene])
            if _has(sums[-1], debt + below[-1]):
                break
        else:
            return None
        new = list(levels)
        for k in range(len(sums) - 2, -1, -1):
            gene, (down, up) = order[k], self._room(levels, order[k], window)
            step = next(
                step
                for step in sorted(range(-down, up + 1), key=abs)
                if _has(sums[k], debt - step * self.sizes[gene] + below[k])
            )
            new[gene] += step
            debt -= step * self.sizes[gene]
        return tuple(new)

    def _room(self, levels: Sequence[int], gene: int, window: int) -> tuple[int, int]:
        """How far a gene can go down and up within its bounds and the window."""
        return min(window, levels[gene] - self.low[gene]), min(window, self.high[gene] - levels[gene])


def _sum(sizes: Sequence[int], levels: Sequence[int]) -> int:
    return sum(size * level for size, level in zip(sizes, levels, strict=True))


def _sums(rooms: Counter[int]) -> int:
    """Bit i: whether i is a sum of sizes, each taken at most as often as it has room."""
    bits = 1
    for size, room in rooms.items():
        bits = _smeared(bits, size, room)
    return bits


def _smeared(bits: int, size: int, times: int) -> int:
    """The bits, and the same moved by one to `times` steps of `size`, in about log2(times) operations."""
    covered = 1
    while covered < times + 1:
        more = min(covered, times + 1 - covered)
        bits |= bits << (more * size)
        covered += more
    return bits


def _has(bits: int, place: int) -> bool:
    return place >= 0 and bool(bits >> place & 1)


def nearest_bit(bits: int, wanted: Fraction) -> int:
    """The place nearest to `wanted` at which a bit is set, the lower of two as near."""
    start = math.floor(wanted)
    lower = bits & ((1 << (start + 1)) - 1)
    upper = bits >> (start + 1)
    places = [lower.bit_length() - 1] if lower else []
    places += [start + (upper & -upper).bit_length()] if upper else []
    return min(places, key=lambda place: (abs(place - wanted), place))
