"""A plan in whole heads and channels: how many of each every block loses, so that the budget is met. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.errors import BudgetError


@dataclass(frozen=True)
class Units:
    """Units of one kind in a block.

    Attributes:
        count: how many there are; one at least stays.
        size: weights of each.
    """

    count: int
    size: int

    @property
    def numel(self) -> int:
        return self.count * self.size


@dataclass(frozen=True)
class Removal:
    """What a block is to lose.

    Attributes:
        heads: units of attention heads.
        channels: units of the MLP.
        of_heads: fraction of the heads' weights that the plan asks for.
        of_channels: fraction of the channels' weights.
    """

    heads: Units
    channels: Units
    of_heads: float
    of_channels: float

    @property
    def weights(self) -> float:
        """Weights that are to go."""
        return self.of_heads * self.heads.numel + self.of_channels * self.channels.numel

    @property
    def most(self) -> int:
        """Weights that can go: all but one head and one channel."""
        return self.heads.numel - self.heads.size + self.channels.numel - self.channels.size


def whole_units(removals: Sequence[Removal], *, alike: bool = False) -> list[tuple[int, int]]:
    """Heads and channels that every block loses, first block to last.

    Heads are coarse, and what the plan asks of them is rounded down. Channels make up for it within the block, and are
    rounded down too; those with the largest remainders are rounded up, later blocks first among equals, until the total
    is within half a channel of what was asked for.

    Args:
        removals: what each block is to lose.
        alike: round channels to the nearest number in each block instead: blocks of the same plan stay alike, and the
            total is off by half a channel of each block at most.

    Raises:
        BudgetError: a block is asked for more than all but one head and one channel; the message has its number.
    """
    for index, removal in enumerate(removals):
        _check(index, removal)
    heads = [_heads(removal) for removal in removals]
    exact = [_channels(removal, lost) for removal, lost in zip(removals, heads, strict=True)]
    if alike:
        return list(zip(heads, [math.ceil(value - 0.5) for value in exact], strict=True))
    channels = [math.floor(value + 1e-9) for value in exact]
    taken = sum(x.heads.size * h + x.channels.size * c for x, h, c in zip(removals, heads, channels, strict=True))
    missing = sum(removal.weights for removal in removals) - taken
    rest = [round(value - whole, 9) for value, whole in zip(exact, channels, strict=True)]
    for i in sorted(range(len(removals)), key=lambda i: (-rest[i], -i)):
        if rest[i] > 0 and missing > removals[i].channels.size / 2:
            channels[i] += 1
            missing -= removals[i].channels.size
    return list(zip(heads, channels, strict=True))


def _check(index: int, removal: Removal) -> None:
    if removal.weights > removal.most + removal.channels.size / 2:
        numel = removal.heads.numel + removal.channels.numel
        raise BudgetError(
            f"The plan leaves block {index} less than one head and one channel",
            got=f"sparsity {removal.weights / numel:.4f} of its {numel:,} weights",
            allowed=f"at most {removal.most / numel:.4f}: {removal.heads.count - 1} of {removal.heads.count} heads and "
            f"{removal.channels.count - 1} of {removal.channels.count} channels",
            fix="a lower sparsity, or a flatter allocation",
        )


def _heads(removal: Removal) -> int:
    """The number nearest to the plan's, rounded down, that the channels can make up for."""
    wanted = math.floor(removal.of_heads * removal.heads.count + 1e-9)

    def beyond(lost: int) -> float:
        channels = (removal.weights - lost * removal.heads.size) / removal.channels.size
        return round(max(-channels, channels - (removal.channels.count - 1), 0.0), 6)

    return min(range(removal.heads.count), key=lambda lost: (beyond(lost), abs(lost - wanted)))


def _channels(removal: Removal, heads: int) -> float:
    exact = (removal.weights - heads * removal.heads.size) / removal.channels.size
    return min(max(exact, 0.0), float(removal.channels.count - 1))
