"""Allocate, then prune: the two steps that the library call and a cell of a sweep share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import apply_pattern
from sparsify.allocators.context import DenseContext
from sparsify.allocators.uniform import Uniform
from sparsify.errors import UsageError
from sparsify.evaluation.perplexity import perplexity
from sparsify.methods.oneshot import LayerResult, OneShot, Progress, silent
from sparsify.model.blocks import BlockView
from sparsify.pruners.base import Pruner
from sparsify.types import Pattern, SparsityPlan, check_sparsity


@dataclass(frozen=True)
class PruneResult:
    """What pruning did.

    Attributes:
        sparsity: counted zeros over all prunable weights.
        plan: the targets and the ledger of the budget.
        layers: one result per layer, in the order of the forward pass.
    """

    sparsity: float
    plan: SparsityPlan
    layers: list[LayerResult]

    def to_rows(self) -> list[dict[str, Any]]:
        return [layer.to_row() for layer in self.layers]


@dataclass(frozen=True)
class Recipe:
    """How to prune: every choice but the model and the text."""

    pruner: Pruner
    allocator: Allocator
    method: OneShot
    pattern: Pattern
    sparsity: float

    @classmethod
    def of(
        cls, pruner: Pruner, allocator: Allocator, method: OneShot, pattern: str | Pattern, sparsity: float | None
    ) -> "Recipe":
        """A recipe with pattern and sparsity made to agree.

        Raises:
            UsageError: sparsity outside [0, 1), or not the one that the N:M pattern implies.
        """
        parsed = Pattern.parse(pattern)
        implied = parsed.sparsity
        if sparsity is None:
            sparsity = implied
        if sparsity is None:
            raise UsageError("This pattern needs a sparsity", got=str(parsed), fix="sparsity=0.75")
        wanted = check_sparsity(sparsity)
        if implied is not None and abs(wanted - implied) > 1e-9:
            raise UsageError(
                f"{parsed} keeps {parsed.kept} of {parsed.group} weights, which fixes the sparsity",
                got=f"sparsity={wanted:g}",
                allowed=f"sparsity={implied:g}",
                fix=f"sparsity={implied:g}, or pattern=mixed:{parsed.group} for a per-layer N",
            )
        if implied is not None and not isinstance(allocator, Uniform):
            raise UsageError(
                f"A fixed {parsed} gives every layer the same sparsity",
                got=f"allocator {type(allocator).__name__}",
                allowed="allocator=uniform",
                fix=f"allocator=uniform, or pattern=mixed:{parsed.group} for a per-layer N",
            )
        return cls(pruner, allocator, method, parsed, wanted)

    def plan(self, context: DenseContext) -> SparsityPlan:
        """Ask the allocator and round to the pattern."""
        table = context.view.table
        self.allocator.check(self.sparsity, table.num_blocks)
        return apply_pattern(self.allocator.allocate(table, self.sparsity, context), table, self.pattern)


def prune_model(
    view: BlockView,
    tokens: Int[Tensor, "n seq"],
    recipe: Recipe,
    *,
    heldout: Int[Tensor, "m seq"] | None = None,
    batch_size: int | None = None,
    dense: Mapping[str, Tensor] | None = None,
    memo: dict[Any, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> PruneResult:
    """Allocate and prune in place.

    Args:
        view: the dense model.
        tokens: calibration token ids, [n, seqlen].
        recipe: what to do.
        heldout: text for allocators that search, [m, seqlen].
        batch_size: windows per forward.
        dense: a snapshot of the dense weights, if there is one already.
        memo: dense-model answers shared between calls with the same model.
        seed: of allocators that draw.
        progress: told after each block, in a search of every trial.
    """
    view.check_finite()

    def try_plan(plan: SparsityPlan) -> float:
        nonlocal dense
        dense = dense or view.snapshot()
        assert heldout is not None
        try:
            recipe.method.apply(
                view,
                tokens,
                recipe.pruner,
                apply_pattern(plan, view.table, recipe.pattern),
                batch_size=batch_size,
                progress=progress,
            )
            return perplexity(view.model, heldout, batch_size=batch_size)
        finally:
            view.restore(dense)

    context = DenseContext(
        view,
        tokens,
        batch_size,
        try_plan if heldout is not None else None,
        {} if memo is None else memo,
        recipe.pruner,
        recipe.pattern,
        heldout,
        seed,
        progress,
    )
    plan = recipe.plan(context)
    layers = recipe.method.apply(view, tokens, recipe.pruner, plan, batch_size=batch_size, progress=progress)
    zeros = sum(layer.zeros for layer in layers)
    return PruneResult(zeros / view.table.numel, plan, layers)
