"""What a method and a stage are given: the model, the choices, and tools to plan, prune and score with."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from sparsify.allocators.base import Allocator, allocate
from sparsify.allocators.budget import apply_pattern
from sparsify.allocators.context import Context
from sparsify.data.examples import Examples, as_examples
from sparsify.data.inputs import Inputs, as_inputs
from sparsify.errors import UsageError
from sparsify.methods.blockwise import BlockwisePruning, LayerResult
from sparsify.methods.checkpoint import Checkpoint
from sparsify.methods.observing import Regime
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.masks import Masks
from sparsify.model.objective import Objective, perplexity
from sparsify.progress import Progress, silent
from sparsify.pruners.base import Pruner
from sparsify.types import Pattern, SparsityPlan


@dataclass
class Job:
    """What there is to do, and what to do it with.

    Attributes:
        view: the model.
        pruner: how a matrix is pruned.
        allocator: how the budget is split.
        pattern: where zeros may stand.
        sparsity: the budget.
        calibration: what statistics are taken on.
        heldout: what searches and choices are scored on; None where there is nothing.
        objective: the loss.
        batch_size: samples per forward.
        seed: of whatever draws.
        snapshot: makes or finds the copy of the dense model.
        memo: what allocators have asked about the dense model.
        progress: to be told of phases.
        checkpoint: keeps what a long method must not lose; of the cell's folder, or nowhere.
        training: what methods and stages train on that name no text of their own.
        inputs: makes what a spec of text names; None where there is no tokenizer.
        prepared: what methods and stages found out about the dense model in `prepare`, by their `id`.
    """

    view: BlockView
    pruner: Pruner
    allocator: Allocator
    pattern: Pattern
    sparsity: float
    calibration: Inputs
    heldout: Inputs | None
    objective: Objective
    batch_size: int | None = None
    seed: int = 0
    snapshot: Callable[[], DenseModel] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    progress: Progress = silent
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    training: Inputs | None = None
    inputs: Callable[[Any], Inputs] | None = None
    prepared: dict[int, Any] = field(default_factory=dict)
    _examples: dict[int, Examples] = field(default_factory=dict, init=False)

    def dense(self) -> DenseModel:
        """The dense model; to be asked for first before anything is changed."""
        if self.snapshot is None:
            self.snapshot = cache(self.view.snapshot)
        return self.snapshot()

    def examples(self, training: Any) -> Examples:
        """What a method or stage trains on, made once.

        Args:
            training: a spec with `inputs(tokenizer, seed)`, `Inputs`, or token ids [n, seqlen]; None for the job's.

        Raises:
            UsageError: there is no text, or only a spec of one where there is no tokenizer.
        """
        if id(training) not in self._examples:
            self._examples[id(training)] = as_examples(self._made(training))
        return self._examples[id(training)]

    def _made(self, training: Any) -> Inputs:
        chosen, spec = self.training if training is None else training, callable(getattr(training, "inputs", None))
        if chosen is None or (spec and self.inputs is None):
            raise UsageError(
                "This trains, and needs text to train on",
                got="training=None" if chosen is None else type(training).__name__,
                fix="sparsify.prune(..., training=<token ids [n, seqlen]>)",
            )
        return self.inputs(chosen) if spec and self.inputs is not None else as_inputs(chosen)

    def plan(
        self,
        sparsity: float,
        *,
        regime: Regime = "propagated",
        changed: bool = False,
        tried: Callable[[SparsityPlan], bool] | None = None,
    ) -> SparsityPlan:
        """The allocator's plan for a sparsity; a loop may ask again and again.

        Args:
            sparsity: zeros over all prunable weights.
            regime: how trials of a searching allocator prune.
            changed: whether the model is no longer the dense one: nothing that is remembered of that counts then, and
                trials come back to the model as it is now.
            tried: prunes the model by a plan on trial, another way than the pruner would; False for a plan that it
                cannot follow.
        """

        def prune(plan: SparsityPlan) -> bool:
            self.prune(apply_pattern(plan, self.view.table, self.pattern), regime=regime)
            return True

        context = self._context(tried or prune, changed, self.checkpoint.of("allocator"))
        return allocate(self.allocator, self.view.table, sparsity, context, self.pattern)

    def share(self, allocator: Allocator, sparsity: float, change: Callable[[SparsityPlan], bool]) -> SparsityPlan:
        """The plan of an allocator that shares out something else than zeros; the model is dense, and so afterwards.

        Args:
            allocator: any rule.
            sparsity: the budget it is asked for.
            change: what a plan that a search tries does to the model; False for one that cannot be followed.
        """
        context = self._context(change, False, self.checkpoint.of("share"))
        return allocate(allocator, self.view.table, sparsity, replace(context, pattern=Pattern()))

    def _context(self, change: Callable[[SparsityPlan], bool], changed: bool, checkpoint: Checkpoint) -> Context:
        """What an allocator may ask; its trials change the model and bring it back."""
        snapshot = cache(self.view.snapshot) if changed or self.snapshot is None else self.snapshot

        def try_plan(plan: SparsityPlan) -> float:
            dense = snapshot()
            try:
                return self.score() if change(plan) else math.inf
            finally:
                self.view.restore(dense)

        return Context(
            view=self.view,
            calibration=self.calibration,
            heldout=self.heldout,
            batch_size=self.batch_size,
            objective=self.objective,
            try_plan=try_plan,
            snapshot=snapshot,
            memo={} if changed else self.memo,
            pruner=self.pruner,
            pattern=self.pattern,
            seed=self.seed,
            progress=self.progress,
            checkpoint=None if changed else checkpoint,
        )

    def prune(
        self, plan: SparsityPlan, *, regime: Regime = "propagated", masks: Masks | None = None
    ) -> list[LayerResult]:
        """Prune the model as it is by a plan, block by block."""
        pruning = BlockwisePruning(self.pruner, regime, self.batch_size, self.objective)
        return pruning.apply(self.view, self.calibration, plan, masks, self.progress)

    def score(self) -> float:
        """Held-out perplexity of the model as it is now."""
        assert self.heldout is not None
        return perplexity(self.view.model, self.heldout, objective=self.objective, batch_size=self.batch_size)
