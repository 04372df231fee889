"""What a method and a stage are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparsify.allocators.base import Allocator
from sparsify.methods.blockwise import LayerResult
from sparsify.methods.job import Job
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.quantisation.grid import Grid
from sparsify.types import Pattern, SparsityPlan


@dataclass(frozen=True)
class MethodResult:
    """What a method did to the model.

    Attributes:
        plan: targets and ledger of the budget.
        layers: one result per layer, in the order of the forward pass.
        masks: what is kept, of every layer that was pruned.
        notes: for the record, JSON-ready.
        grids: of every layer, by name, where the method quantised.
    """

    plan: SparsityPlan
    layers: list[LayerResult]
    masks: Masks
    notes: Mapping[str, Any] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)


class Method(ABC):
    """How a model is pruned: a frozen dataclass. A straight line, or a loop that allocates, prunes and trains.

    Attributes:
        version: raised whenever a change moves its numbers; part of a run's identity.
        keeps_shapes: False for one that makes matrices smaller.
    """

    version: int
    keeps_shapes: ClassVar[bool] = True

    def check(self, pattern: Pattern, allocator: Allocator, stages: Mapping[str, "Stage"]) -> None:  # noqa: B027
        """Refuse choices that do not go together, before a model is loaded."""

    def prepare(self, job: Job) -> None:  # noqa: B027
        """Refuse, before anything is done, what could not be done later."""

    @abstractmethod
    def apply(self, view: BlockView, job: Job) -> MethodResult:
        """Prune the model in place."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
        masks: as they are now.
        notes: for the record.
        sparse: False where the stage filled the zeros again: a baseline, whose masks hold no longer.
        grids: of every layer, by name, where the stage quantised.
    """

    masks: Masks
    notes: Mapping[str, Any] = field(default_factory=dict)
    sparse: bool = True
    grids: Mapping[str, Grid] = field(default_factory=dict)


class Stage(ABC):
    """Something that happens to a model after pruning: training (`recovery`), then quantisation (`quantiser`).

    A frozen dataclass. It may change any part of the model, but leaves the modules it found: what it added for itself
    (adapters, say) is merged before it returns. Weights that are not kept stay zero.

    Attributes:
        version: raised whenever a change moves its numbers; part of a run's identity.
    """

    version: int

    def prepare(self, job: Job) -> None:  # noqa: B027
        """Refuse, before the model is pruned, what could not be done after it; the model is dense now."""

    @abstractmethod
    def apply(self, view: BlockView, masks: Masks, job: Job) -> StageResult:
        """Change the model in place; hand on the masks, as they are or with fewer weights kept."""
