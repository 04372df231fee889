"""What a pruner is."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.errors import UsageError
from sparsify.model.statistics import LayerStats, Needs
from sparsify.pruners.masks import Group, keep_mask
from sparsify.types import Target


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix.

    Attributes:
        weight: the new weight, zero where `keep` is False, [out, inp].
        keep: the mask.
        notes: what the record should say about this layer (the damping that was needed, say).
    """

    weight: Float[Tensor, "out inp"]
    keep: Bool[Tensor, "out inp"]
    notes: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Pruner(Protocol):
    """Prunes one matrix, given statistics of its input.

    Attributes:
        needs: statistics it reads, of `model.statistics` or its own; empty for data-free pruners.
        version: raised whenever a change moves its numbers; part of a run's identity.
    """

    needs: ClassVar[Needs]

    @property
    def version(self) -> int: ...

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned: ...


@dataclass(frozen=True)
class ScorePruner:
    """A pruner that ranks weights by a score and changes none of those it keeps.

    Attributes:
        group: which weights compete with each other: `row`, `matrix` or `columns` (slabs of 128 inputs).
    """

    needs: ClassVar[Needs]
    group: Group = "row"
    version: int = 1

    def __post_init__(self) -> None:
        if self.group not in ("row", "matrix", "columns"):
            raise UsageError("Unknown comparison group", got=self.group, allowed="row, matrix, columns")

    @property
    def by_neighbours(self) -> bool:
        """Whether a group of N:M is M consecutive inputs, whatever N is, so that ranks within it say all levels."""
        return True

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        """Importance of each weight in fp32; the lowest go."""
        raise NotImplementedError

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Zero the lowest scores of every group."""
        keep = keep_mask(self.score(weight, stats), target, self.group)
        return Pruned(weight * keep, keep)
