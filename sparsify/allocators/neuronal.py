"""NeuronAL: a linear schedule over depth, chosen so that the activations stay aligned with the dense model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsify.allocators.base import Context, outlier_mapping
from sparsify.allocators.budget import fit_plan
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable, SparsityPlan

GRID = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)
"""The released search; at 80% it leaves out 0.25, which would ask a block for more than everything."""


@dataclass(frozen=True)
class NeuronAL:
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

    def check(self, wanted: float, num_blocks: int) -> None:
        """Any schedule is held within [0, 0.99]."""

    def allocate(self, layers: LayerTable, wanted: float, context: Context) -> SparsityPlan:
        if self.lam != "auto":
            return schedule(layers, float(self.lam), wanted)
        plans = {lam: schedule(layers, lam, wanted) for lam in legal_grid(wanted)}
        shifts: dict[float, float] = {}
        for lam, plan in plans.items():
            shifts[lam] = activation_shift(context, plan, self.windows)
            context.progress(len(shifts), len(plans))
        finite = {lam: shift for lam, shift in shifts.items() if math.isfinite(shift)}
        if not finite:
            raise NumericsError("No schedule leaves the activations finite", got=shifts, fix="a lower sparsity")
        best = min(finite, key=finite.__getitem__)
        trials = tuple({"lam": lam, "activation_shift": finite.get(lam)} for lam in shifts)
        return SparsityPlan(plans[best].targets, plans[best].ledger, trials, {"lam": best})


def legal_grid(wanted: float) -> list[float]:
    """The schedules of the search that stay within [0, 1]; uniform where none does."""
    return [lam for lam in GRID if lam <= min(wanted, 1 - wanted) + 1e-9] or [0.0]


def schedule(layers: LayerTable, lam: float, wanted: float) -> SparsityPlan:
    """Sparsities rising in equal steps from block to block, `2 lam` from first to last."""
    by_block = outlier_mapping([-float(i) for i in range(layers.num_blocks)], 2 * lam, wanted)
    return fit_plan(layers, layers.spread(by_block), wanted, high=max(0.99, wanted))


def activation_shift(context: Context, plan: SparsityPlan, windows: int) -> float:
    """How far pruning moves the normalised activations, summed over layers; the score that is minimised."""
    moved = [
        (before / before.sum() - after / after.sum()).norm() / before.numel()
        for before, after in context.input_norms(plan, windows)
    ]
    return float(sum(value.double().cpu() for value in moved))
