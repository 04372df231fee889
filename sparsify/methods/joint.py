"""Pruning and quantising in one solve: SparseGPT's walk over the columns, rounding the weights that it keeps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsify.allocators.base import Allocator
from sparsify.errors import UsageError
from sparsify.methods.base import Method, MethodResult, Stage
from sparsify.methods.blockwise import LayerResult, named
from sparsify.methods.job import Job
from sparsify.methods.observing import Regime, check_regime, observed
from sparsify.methods.quantising import Quantising, put
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.model.prunable import Layer
from sparsify.model.statistics import GRAM, LayerStats, full_precision
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.sparsegpt import SparseGPT, inverse_factor
from sparsify.quantisation.gptq import Quantised, check_nesting, prune_and_quantise, quantise, round_to_nearest
from sparsify.quantisation.grid import Grid
from sparsify.types import Pattern, Target


@dataclass(frozen=True, kw_only=True)
class Joint(Quantising, Method):
    """A plan for the budget, and one walk that prunes by it and quantises what stays (`prune_and_quantise`).

    Source: SparseGPT (arXiv 2301.00774), Section 3.5. The pruner is `sparsegpt`, whose damping and slabs are used;
    beside it, `quantiser=gptq` with `method=oneshot` prunes first and quantises then. Trials of an allocator that
    searches prune and do not quantise. An expert that no token was routed to is pruned by magnitude and rounded to
    nearest.

    Attributes:
        regime: where a layer's statistics come from (`methods.observing.observed`).
    """

    place: ClassVar[str] = "method"
    regime: Regime = "propagated"
    version: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_regime(self.regime)

    def check(self, pattern: Pattern, allocator: Allocator, stages: Mapping[str, Stage]) -> None:
        if stages:
            raise UsageError(
                "This method leaves its weights quantised, and a stage after it would move them",
                got=f"{next(iter(stages))} after {type(self).__name__}",
                fix=f"{next(iter(stages))}=null, or method=oneshot with quantiser=gptq as the last stage",
            )

    def prepare(self, job: Job) -> None:
        if not isinstance(job.pruner, SparseGPT) or job.pruner.rule != "exact":
            raise UsageError(
                "Only SparseGPT prunes and quantises in one solve",
                got=f"pruner {type(job.pruner).__name__}",
                allowed="pruner=sparsegpt with pruner.rule=exact",
                fix="pruner=sparsegpt, or method=oneshot quantiser=gptq for pruning first and quantising then",
            )
        check_nesting(job.pattern.group, self.group, max(layer.in_features for layer in job.view.table))
        super().prepare(job)

    @torch.no_grad()
    def apply(self, view: BlockView, job: Job) -> MethodResult:
        bits, told = job.prepared[id(self)]
        plan, needs = job.plan(job.sparsity, regime=self.regime), frozenset({GRAM})
        rows, masks, grids = list[LayerResult](), Masks(), dict[str, Grid]()
        with full_precision():
            for layer, stats in observed(
                view, job.calibration, needs, self.regime, job.batch_size, progress=job.progress
            ):
                name, target, start = layer.spec.name, plan.targets[layer.spec.name], time.perf_counter()
                with named(name):
                    found = self._solved(layer, job, target, bits, stats)
                seconds, error = time.perf_counter() - start, put(layer, found, stats)
                rows.append(_row(layer, target, error, seconds, stats))
                grids[name] = found.grid.to("cpu")
                if target.sparsity > 0:
                    masks[name] = found.keep
        return MethodResult(plan, rows, masks, self._notes(view, masks, grids) | told, grids)

    def _solved(self, layer: Layer, job: Job, target: Target, bits: Mapping[str, int], stats: LayerStats) -> Quantised:
        pruner, fineness = job.pruner, self._fineness(layer, bits)
        assert isinstance(pruner, SparseGPT)
        weight, keep = self._matrix(layer, None)
        if not stats.seen:
            return round_to_nearest(weight, Magnitude().prune(weight, stats, target).keep, *fineness)
        factor = stats.once(("inverse", pruner.damp), lambda: inverse_factor(stats.gram, pruner.damp))
        if target.sparsity == 0:
            return quantise(weight, keep, factor, *fineness)
        return prune_and_quantise(weight, target, factor, *fineness, pruner.columns)


def _row(layer: Layer, target: Target, error: float, seconds: float, stats: LayerStats) -> LayerResult:
    spec, zeros = layer.spec, int((layer.weight == 0).sum())
    notes = {} if stats.seen else {"unseen": "no calibration token was routed here: by magnitude, to nearest"}
    return LayerResult(
        spec.block, spec.name, target.sparsity, zeros / spec.numel, zeros, spec.numel, error, seconds, notes
    )
