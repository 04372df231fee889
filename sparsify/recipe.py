"""How to prune: the choices, and what the library call and a cell of a sweep do with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsify.allocators.base import Allocator
from sparsify.allocators.uniform import Uniform
from sparsify.data.inputs import Inputs
from sparsify.errors import UsageError
from sparsify.methods.base import Method, Stage
from sparsify.methods.blockwise import LayerResult
from sparsify.methods.checkpoint import Checkpoint
from sparsify.methods.job import Job
from sparsify.model.blocks import BlockView
from sparsify.model.calls import run_blocks
from sparsify.model.dense import DenseModel
from sparsify.model.limits import check_causal, check_readable
from sparsify.model.masks import Masks
from sparsify.model.objective import NextToken, Objective
from sparsify.progress import Progress, silent
from sparsify.pruners.base import Pruner
from sparsify.quantisation.grid import Grid, check_on_grids
from sparsify.types import Pattern, Skipped, SparsityPlan, check_sparsity


@dataclass(frozen=True)
class PruneResult:
    """What pruning did.

    Attributes:
        sparsity: counted zeros, or weights that are gone, over all prunable weights, after the last stage.
        plan: the targets and the ledger of the budget.
        layers: one result per layer, in the order of the forward pass.
        masks: which weights are kept, by layer name; none of matrices that became smaller.
        notes: what the allocator, the method and the stages noted.
        skipped: matrices of the blocks that are not pruned, and why.
        grids: levels of every layer's weights, by name, where they were quantised.
    """

    sparsity: float
    plan: SparsityPlan
    layers: list[LayerResult]
    masks: Masks
    notes: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def to_rows(self) -> list[dict[str, Any]]:
        return [layer.to_row() for layer in self.layers]


@dataclass(frozen=True)
class Recipe:
    """How to prune: every choice but the model and the text.

    Attributes:
        pruner: how a matrix is pruned.
        allocator: how the budget is split.
        method: the order of things.
        pattern: where zeros may stand.
        sparsity: the budget.
        objective: the loss that searches and gradients mean.
        stages: what follows pruning, in order, by name.
    """

    pruner: Pruner
    allocator: Allocator
    method: Method
    pattern: Pattern
    sparsity: float
    objective: Objective = field(default_factory=NextToken)
    stages: Mapping[str, Stage] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pruner: Pruner,
        allocator: Allocator,
        method: Method,
        pattern: str | Pattern,
        sparsity: float | None,
        *,
        objective: Objective | None = None,
        stages: Mapping[str, Stage] | None = None,
    ) -> "Recipe":
        """A recipe with pattern and sparsity made to agree.

        Raises:
            UsageError: sparsity outside [0, 1), not the one that the N:M pattern implies, or choices that the method
                does not go with.
        """
        kinds = {"pruner": (pruner, Pruner), "allocator": (allocator, Allocator), "method": (method, Method)}
        kinds |= {name: (stage, Stage) for name, stage in (stages or {}).items()}
        for name, (component, kind) in (kinds | {"objective": (objective or NextToken(), Objective)}).items():
            _check_kind(name, component, kind)
        parsed = Pattern.parse(pattern)
        if sparsity is None:
            sparsity = parsed.sparsity
        if sparsity is None:
            raise UsageError("This pattern needs a sparsity", got=str(parsed), fix="sparsity=0.75")
        budget = check_sparsity(sparsity)
        if parsed.sparsity is not None:
            _check_fixed(parsed, parsed.sparsity, budget, allocator)
        method.check(parsed, allocator, stages or {})
        return cls(pruner, allocator, method, parsed, budget, objective or NextToken(), dict(stages or {}))


def _check_kind(name: str, component: Any, kind: type[Any]) -> None:
    if not isinstance(component, kind):
        what = f"This is no {name}: it has not what a {kind.__name__} has"
        raise UsageError(what, got=repr(component)[:80], fix=f"{name} by name, or an object with all of it")


def _check_fixed(pattern: Pattern, implied: float, sparsity: float, allocator: Allocator) -> None:
    if abs(sparsity - implied) > 1e-9:
        raise UsageError(
            f"{pattern} keeps {pattern.kept} of {pattern.group} weights, which fixes the sparsity",
            got=f"sparsity={sparsity:g}",
            allowed=f"sparsity={implied:g}",
            fix=f"sparsity={implied:g}, or pattern=mixed:{pattern.group} for a per-layer N",
        )
    if not isinstance(allocator, Uniform):
        raise UsageError(
            f"A fixed {pattern} gives every layer the same sparsity",
            got=f"allocator {type(allocator).__name__}",
            allowed="allocator=uniform",
            fix=f"allocator=uniform, or pattern=mixed:{pattern.group} for a per-layer N",
        )


def prune_model(
    view: BlockView,
    calibration: Inputs,
    recipe: Recipe,
    *,
    heldout: Inputs | None = None,
    batch_size: int | None = None,
    snapshot: Callable[[], DenseModel] | None = None,
    memo: dict[Any, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
    training: Inputs | None = None,
    inputs: Callable[[Any], Inputs] | None = None,
) -> PruneResult:
    """Prune in place by the recipe's method, then run its stages.

    The library call and a cell come through here, with the same random numbers for a seed.

    Args:
        view: the dense model.
        calibration: what statistics are taken on.
        recipe: what to do.
        heldout: inputs for allocators that search.
        batch_size: samples per forward.
        snapshot: a copy of the dense model, if there is one already.
        memo: dense-model answers shared between calls with the same model.
        seed: of whatever draws.
        progress: told of phases.
        checkpoint: of the cell's folder.
        training: what methods and stages train on that name no text of their own.
        inputs: makes what a spec of training text names.
    """
    view.check_finite()
    for given in (calibration, heldout):
        if given is not None:
            check_readable(view.model, given)
    check_causal(view.model, calibration)
    job = Job(
        view=view,
        pruner=recipe.pruner,
        allocator=recipe.allocator,
        pattern=recipe.pattern,
        sparsity=recipe.sparsity,
        calibration=calibration,
        heldout=heldout,
        objective=recipe.objective,
        batch_size=batch_size,
        seed=seed,
        snapshot=snapshot,
        memo={} if memo is None else memo,
        progress=progress,
        checkpoint=checkpoint or Checkpoint(),
        training=training,
        inputs=inputs,
    )
    recipe.method.prepare(job)
    for stage in recipe.stages.values():
        stage.prepare(job)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        pruned = recipe.method.apply(view, job)
        masks, grids, notes = pruned.masks, pruned.grids, {**pruned.plan.notes, **pruned.notes}
        for name, stage in recipe.stages.items():
            staged = stage.apply(view, masks, job)
            grids = staged.grids
            notes |= {f"{name}.{key}": value for key, value in staged.notes.items()}
            if not staged.sparse:
                masks = Masks()  # nothing is known to be zero
                continue
            staged.masks.check_within(masks)
            masks = staged.masks
            masks.check(view)
    check_on_grids(view, grids)
    check_zeros_stay(view, masks, calibration)
    return PruneResult(view.sparsity(), pruned.plan, pruned.layers, masks, notes, tuple(view.skipped), grids)


@torch.no_grad()
def check_zeros_stay(view: BlockView, masks: Masks, inputs: Inputs) -> None:
    """Run the model on a few tokens and look whether the zeros are still there.

    Raises:
        NumericsError: something writes weights anew when the model runs; the message names the layer.
    """
    run_blocks(view, inputs.probe(view.device))
    masks.check(view, fix="remove what writes its weights at every forward: hooks, parametrisations, offloading")
