"""Structured pruning: attention heads and MLP channels taken out by group Taylor importance (LLM-Pruner)."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import weighted_mean
from sparsify.allocators.uniform import Uniform
from sparsify.allocators.units import Removal, Units, whole_units
from sparsify.errors import BudgetError, PatternError, UsageError
from sparsify.methods.base import Method, MethodResult, Stage
from sparsify.methods.blockwise import LayerResult
from sparsify.methods.job import Job
from sparsify.model.blocks import BlockView
from sparsify.model.coupled import Coupled, coupled_of
from sparsify.model.masks import Masks
from sparsify.model.removal import remove
from sparsify.model.sizes import follow
from sparsify.model.trial import try_removal
from sparsify.model.walk import default_batch_size
from sparsify.pruners.taylor import ORDERS, REDUCTIONS, Order, Reduction, importances, most_important
from sparsify.types import LayerSpec, LayerTable, Ledger, Pattern, SparsityPlan, Target, check_whole


@dataclass(frozen=True)
class Structured(Method):
    """Remove the least important heads and channels of every block, so that matrices become smaller; no training.

    A unit is a key/value head with the queries that read it (rows of q, k and v, columns of o), or an MLP channel (rows
    of gate and up, a column of down). How much each block loses, the allocator says: what it asks of a block's matrices
    is rounded to whole units (`allocators.units.whole_units`), the total to within half a channel of the budget. Which
    units go is decided within the block, heads among heads and channels among channels, all at once and by gradients of
    the dense model on the calibration text: one backward pass for every batch.

    Source: Ma et al., LLM-Pruner (arXiv 2305.11627), block-wise with first-order importance, as ATP (arXiv 2502.14770)
    takes it: sparsities by block for its pruning ratios.

    Deviations: the release prunes LLaMA-7B in blocks 4 to 29 alone: `spare_first=4`, `spare_last=2`, and then the other
    blocks lose more, so that the whole model meets the budget, which the release misses by rounding down. Its choices
    without gradients (random, L1, L2), second-order terms and iterations are left out. Its calibration text is 10
    samples of 64 tokens of BookCorpus; here it is the run's. The run's pruner prunes nothing: an allocator that
    searches on a proxy of it reads it, the others do not.

    Attributes:
        order: of absolute value and sum: `element`, sum |W G|; `vector`, |sum W G| of a row or column.
        reduction: over the matrices of a unit: `sum`, `mean` (the same ranks) or `max`.
        spare_first: blocks at the start that are left whole, with a uniform allocation of the others.
        spare_last: blocks at the end.
        alike: round each block by itself, so that blocks of one target stay alike.
    """

    keeps_shapes: ClassVar[bool] = False
    order: Order = "element"
    reduction: Reduction = "sum"
    spare_first: int = 0
    spare_last: int = 0
    alike: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if self.order not in ORDERS or self.reduction not in REDUCTIONS:
            raise UsageError(
                "Unknown importance",
                got=f"order={self.order}, reduction={self.reduction}",
                allowed=f"order: {', '.join(ORDERS)}; reduction: {', '.join(REDUCTIONS)}",
                fix="method.order=element method.reduction=sum",
            )
        check_whole("spare_first", self.spare_first, 0)
        check_whole("spare_last", self.spare_last, 0)

    @property
    def spares(self) -> bool:
        """Whether any block is left whole."""
        return bool(self.spare_first or self.spare_last)

    def check(self, pattern: Pattern, allocator: Allocator, stages: Mapping[str, Stage]) -> None:
        _refuse_pattern(pattern)
        if self.spares and not isinstance(allocator, Uniform):
            raise UsageError(
                "Blocks are left whole only where no allocator decides about each",
                got=f"spare_first={self.spare_first}, spare_last={self.spare_last} with {type(allocator).__name__}",
                allowed="allocator=uniform",
                fix="method.spare_first=0 method.spare_last=0",
            )
        for name, stage in stages.items():
            _refuse_teacher(name, stage)

    def prepare(self, job: Job) -> None:
        if job.sparsity == 0:
            return
        _Run(self, job.view, job).check_budget()
        try_removal(job.view, job.calibration, job.dense())

    def apply(self, view: BlockView, job: Job) -> MethodResult:
        return _Run(self, view, job).result()


def _refuse_pattern(pattern: Pattern) -> None:
    if pattern.group is not None:
        raise PatternError(
            "Structured pruning removes whole heads and channels, and no pattern is left to keep within a matrix",
            got=f"pattern={pattern}",
            allowed="pattern=unstructured",
            fix=f"method=oneshot pattern={pattern}",
        )


def _refuse_teacher(name: str, stage: Stage) -> None:
    """A teacher is a copy of the pruned model with the dense weights in it, which no longer fit."""
    if getattr(getattr(stage, "schedule", None), "distill", False):
        raise UsageError(
            "A stage cannot distil from the dense model after structured pruning: its matrices are larger",
            got=f"{name} with distill={stage.schedule.distill}",  # type: ignore[attr-defined]
            allowed="training on the text itself",
            fix=f"{name}.schedule.distill=0.0",
        )


@dataclass
class _Run:
    """One run: what is known of the dense model, and what becomes of it."""

    method: Structured
    view: BlockView
    job: Job
    table: LayerTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = self.view.table

    @cached_property
    def groups(self) -> list[Coupled]:
        """Heads and channels of the first block, of the second, and so on."""
        return coupled_of(self.view)

    @cached_property
    def units(self) -> list[Units]:
        """Their numbers and sizes in the dense model."""
        return [Units(group.count, group.size) for group in self.groups]

    @cached_property
    def importances(self) -> list[Tensor]:
        """Of the dense model's units; to be asked for first before any is gone."""
        job, method = self.job, self.method
        size = job.batch_size or default_batch_size(self.view.device, job.calibration.length)
        return importances(
            self.view,
            self.groups,
            job.calibration,
            job.objective,
            order=method.order,
            reduction=method.reduction,
            batch_size=size,
            progress=job.progress,
        )

    @property
    def pruned_blocks(self) -> range:
        return range(self.method.spare_first, len(self.view.blocks) - self.method.spare_last)

    def check_budget(self) -> None:
        """Refuse a sparsity that leaves some block without a head or without a channel.

        Raises:
            BudgetError: with the highest there is.
        """
        blocks = self.pruned_blocks
        if not blocks:
            raise UsageError(
                "Every block is left whole",
                got=f"spare_first={self.method.spare_first}, spare_last={self.method.spare_last}",
                allowed=f"fewer than the model's {len(self.view.blocks)} blocks together",
                fix="method.spare_first=0 method.spare_last=0",
            )
        most = sum(unit.numel - unit.size for i in blocks for unit in self.units[2 * i : 2 * i + 2])
        if self.job.sparsity * self.table.numel > most:
            raise BudgetError(
                f"One head and one channel stay in each of the {len(blocks)} blocks that are pruned",
                got=f"sparsity={self.job.sparsity:g}, {round(self.job.sparsity * self.table.numel):,} weights",
                allowed=f"at most {most / self.table.numel:.6f}: {most:,} of {self.table.numel:,} weights",
                fix=f"sparsity={int(1000 * most / self.table.numel) / 1000:g}",
            )

    def result(self) -> MethodResult:
        if self.job.sparsity == 0:
            plan = self.job.plan(0.0)
            return MethodResult(plan, self.job.prune(plan), Masks())
        plan = self._plan()
        lost = self.lost(plan)
        began, before = time.perf_counter(), _parameters(self.view)
        dense = {layer.spec.name: layer.weight for layer in self.view.layers}
        _ = self.importances
        counted = time.perf_counter()
        self.remove(lost)
        own_format = follow(self.view) if any(lost) else None
        seconds = {"importance_seconds": counted - began, "removal_seconds": time.perf_counter() - counted}
        rounded = self.rounded(plan, lost)
        notes = self._notes(lost) | {"parameters_before": before, "parameters_after": _parameters(self.view)} | seconds
        notes |= {"own_format": own_format} if own_format else {}
        return MethodResult(rounded, self._rows(rounded, dense), Masks(), notes)

    def _plan(self) -> SparsityPlan:
        job = self.job
        if not self.method.spares:
            return job.plan(job.sparsity, tried=self.tried)
        inside = set(self.pruned_blocks)
        share = job.sparsity * self.table.numel / sum(x.numel for x in self.table if x.block in inside)
        targets = {x.name: Target(share if x.block in inside else 0.0) for x in self.table}
        return SparsityPlan(targets, Ledger(job.sparsity, job.sparsity, job.sparsity, job.sparsity))

    def tried(self, plan: SparsityPlan) -> bool:
        """Prune by an allocator's plan on trial; False for one that leaves a block without a head or channel."""
        _ = self.importances
        try:
            lost = self.lost(plan)
        except BudgetError:
            return False
        self.remove(lost)
        return True

    def lost(self, plan: SparsityPlan) -> list[int]:
        """Units that every group loses."""
        units, asked = self.units, [self._asked(plan, group) for group in self.groups]
        blocks = range(0, len(self.groups), 2)
        removals = [Removal(units[i], units[i + 1], asked[i], asked[i + 1]) for i in blocks]
        return [count for pair in whole_units(removals, alike=self.method.alike) for count in pair]

    def _asked(self, plan: SparsityPlan, group: Coupled) -> float:
        """What the plan asks of a group's matrices, by their weights."""
        sizes = {layer.name: layer.numel for layer in self.table}
        names = list(group.linears)
        return weighted_mean([plan.targets[name].sparsity for name in names], [sizes[name] for name in names])

    def remove(self, lost: list[int]) -> None:
        """Take the least important units out."""
        for group, values, count in zip(self.groups, self.importances, lost, strict=True):
            if count:
                remove(group, most_important(values, group.count - count))
        self.view.refresh()

    def rounded(self, plan: SparsityPlan, lost: list[int]) -> SparsityPlan:
        """The plan in whole units."""
        targets = {
            name: Target(count / units.count)
            for group, units, count in zip(self.groups, self.units, lost, strict=True)
            for name in group.linears
        }
        ordered = {layer.name: targets[layer.name] for layer in self.table}
        mean = weighted_mean([target.sparsity for target in ordered.values()], [layer.numel for layer in self.table])
        return replace(plan, targets=ordered, ledger=replace(plan.ledger, rounded=mean))

    def _notes(self, lost: list[int]) -> dict[str, Any]:
        """Units of every block before and after; key/value heads, where queries share them."""
        before = [units.count for units in self.units]
        after = [units.count - count for units, count in zip(self.units, lost, strict=True)]
        counts = {"heads_before": before[::2], "heads": after[::2], "channels_before": before[1::2]}
        return counts | {"channels": after[1::2]}

    @torch.no_grad()
    def _rows(self, plan: SparsityPlan, dense: Mapping[str, Tensor]) -> list[LayerResult]:
        now = {layer.spec.name: layer.weight for layer in self.view.layers}
        return [_row(spec, plan.targets[spec.name], dense[spec.name], now[spec.name]) for spec in self.table]


def _row(spec: LayerSpec, target: Target, before: Float[Tensor, "..."], after: Float[Tensor, "..."]) -> LayerResult:
    """What a matrix lost: its weights that are gone count as zeros, and the error is that of the weights."""
    zeros = spec.numel - after.numel()
    kept, whole = (float(weight.float().square().sum(dtype=torch.float64)) for weight in (after, before))
    error = math.sqrt(max(1 - kept / whole, 0.0)) if whole else 0.0
    return LayerResult(
        spec.block,
        spec.name,
        target.sparsity,
        zeros / spec.numel,
        zeros,
        spec.numel,
        error,
        0.0,
        {"shape": list(after.shape)},
    )


def _parameters(view: BlockView) -> int:
    """Parameters of the whole model, with embeddings, biases and norms; tied ones once."""
    return sum(parameter.numel() for parameter in view.model.parameters())
