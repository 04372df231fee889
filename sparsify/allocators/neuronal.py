"""NeuronAL: a linear schedule over depth, chosen so that the activations stay aligned with the dense model's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator, outlier_mapping
from sparsify.allocators.budget import HIGH
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile, by_block
from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import NORM
from sparsify.types import LayerTable, SparsityPlan

GRID = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)
"""The released search; at 80% it leaves out 0.25, which would ask a block for more than everything."""


@dataclass(frozen=True)
class NeuronAL(Allocator):
    """Sparsity rising linearly from S - lam to S + lam, with the lam that moves the activations least.

    Source: Cunegatti et al., "Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training" (arXiv
    2411.07066), the block step by the released code (`get_neuroal_block`): over all layers, the sum of
    || a / sum(a) - b / sum(b) ||_2 / numel, where a and b are the input norms of a layer before and after its block
    was pruned, the blocks before it pruned too. For equal blocks the schedule is ATP's with beta = 2 lam / (L - 1).

    Deviations: the row step, which gives every output row a sparsity of its own, is left out: plans are per layer. A
    lam beyond min(S, 1 - S) is not tried (the release clips), and the budget is weighted by parameters. The trials
    prune with the pruner of the run.

    Attributes:
        lam: half the width of the range of sparsities, or `auto` to search it.
        windows: calibration windows of the search, 8 in the release.
    """

    lam: float | Literal["auto"] = "auto"
    windows: int = 8
    version: int = 1

    def __post_init__(self) -> None:
        number = isinstance(self.lam, int | float) and 0 <= self.lam <= 0.5
        if self.lam != "auto" and not number:
            raise UsageError("lam is half a range of sparsities", got=repr(self.lam), allowed="auto, 0 <= lam <= 0.5")
        if self.windows < 1:
            raise UsageError("The search needs calibration windows", got=self.windows, fix="allocator.windows=8")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        if self.lam != "auto":
            return schedule(layers, float(self.lam), sparsity)
        profiles = {lam: schedule(layers, lam, sparsity) for lam in legal_grid(sparsity)}
        shifts: dict[float, float] = {}
        context.progress("trial", 0, len(profiles))
        for lam, profile in profiles.items():
            shifts[lam] = activation_shift(context, profile.fitted(layers, sparsity, context.pattern), self.windows)
            context.progress("trial", len(shifts), len(profiles))
        finite = {lam: shift for lam, shift in shifts.items() if math.isfinite(shift)}
        if not finite:
            raise NumericsError("No schedule leaves the activations finite", got=shifts, fix="a lower sparsity")
        best = min(finite, key=finite.__getitem__)
        trials = tuple({"lam": lam, "activation_shift": finite.get(lam)} for lam in shifts)
        return replace(profiles[best], trials=trials, notes={"lam": best})


def legal_grid(sparsity: float) -> list[float]:
    """The schedules of the search that stay within [0, 1]; uniform where none does."""
    return [lam for lam in GRID if lam <= min(sparsity, 1 - sparsity) + 1e-9] or [0.0]


def schedule(layers: LayerTable, lam: float, sparsity: float) -> Profile:
    """Sparsities rising in equal steps from block to block, `2 lam` from first to last."""
    values = outlier_mapping([-float(i) for i in range(layers.num_blocks)], 2 * lam, sparsity)
    return by_block(layers, values, high=max(HIGH, sparsity))


def activation_shift(context: Context, plan: SparsityPlan, windows: int) -> float:
    """How far pruning moves the normalised activations, summed over layers; the score that is minimised."""
    moved = [
        (before / before.sum() - after / after.sum()).norm() / before.numel()
        for before, after in input_norms(context, plan, windows)
    ]
    return float(sum(value.double().cpu() for value in moved))


@torch.no_grad()
def input_norms(
    context: Context, plan: SparsityPlan, windows: int
) -> Iterator[tuple[Float[Tensor, " inp"], Float[Tensor, " inp"]]]:
    """||X_j|| of every layer's input before and after its block is pruned by `plan`, all earlier blocks pruned.

    One walk; each block is pruned as in the propagated regime, observed again, and put back.

    Raises:
        UsageError: this context has no pruner.
    """
    if context.pruner is None:
        raise UsageError("This allocator prunes on trial, and the context has no pruner", fix="use sparsify.prune")
    walk, view = context.walk(windows, context.pruner.needs), context.view
    for block in range(len(view.blocks)):
        layers = view.layers_of(block)
        before = walk.observe(block, context.pruner.needs | {NORM})
        pruned = {
            x.spec.name: context.pruner.prune(x.weight, before[x.spec.name], plan.targets[x.spec.name]).weight
            for x in layers
        }
        with view.replaced(block, pruned):
            after = walk.observe(block, frozenset({NORM}), advance=True)
        yield from ((before[x.spec.name].norm, after[x.spec.name].norm) for x in layers)
