"""Absorption-aware correction: prune more where later blocks absorb what pruning disturbs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsify.allocators.base import Allocator, Context, finite_or_none
from sparsify.allocators.budget import fit_plan
from sparsify.allocators.owl import OWL
from sparsify.analysis.absorption import Reading, absorption
from sparsify.analysis.perturbation import Pruned, Source
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable, SparsityPlan, check_whole

if TYPE_CHECKING:
    from sparsify.analysis.drift import Drift

CONTROLS = ("none", "flipped", "permuted", "ramp", "first")


@dataclass(frozen=True)
class AbsorptionCorrected:
    """Any allocator plus a bounded correction by its blocks' absorption: s'_l = s_l + strength D_l / (2 clip).

    Source: arXiv 2606.15161, by second-hand notes: D_l = -(u_l - mean u), u_l = clip(log r_l, +-log 3), r_l the share
    of a relative disturbance of block l that is left at the last block. No code was released; how strong the correction
    is and how it is bounded are our reading: |D_l| <= 2 clip, so the correction moves no block by more than `strength`,
    before all are shifted and clipped to [0, 0.99] until the budget is met exactly. At strength 0 the plan is the inner
    one, untouched.

    With `strength="auto"` the strengths of `grid` are tried in full and the lowest perplexity on held-out calibration
    text wins; zero is among them. The plan has the trials of the inner allocator before its own, and its notes as
    `inner.<name>`.

    Attributes:
        inner: the allocator that is corrected.
        strength: largest change of a block's sparsity, or `auto`.
        source: the disturbance; a pruned block without a sparsity takes the wanted one. By default a block is really
            pruned: the abstract speaks of perturbations of pruning's scale. The notes have noise of eta = 0.01.
        reading: how coefficients are read off the drift.
        windows: calibration windows that are disturbed; None for all.
        seeds: draws of the noise; the same whatever the seed of the cell, which draws other calibration text.
        grid: strengths that `auto` tries.
        control: `none`; or what the correction must beat to mean anything: `flipped` in sign, `permuted` among blocks,
            a linear `ramp` over depth of the same root mean square, or the `first` block's correction alone.
    """

    inner: Allocator = field(default_factory=OWL)
    strength: float | Literal["auto"] = "auto"
    source: Source = field(default_factory=Pruned)
    reading: Reading = field(default_factory=Reading)
    windows: int | None = 8
    seeds: int = 1
    grid: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.8, 1.6])
    control: Literal["none", "flipped", "permuted", "ramp", "first"] = "none"
    version: int = 1

    def __post_init__(self) -> None:
        for name, kind, fix in (
            ("inner", Allocator, "allocator@allocator.inner=<name>"),
            ("source", Source, "perturbation@allocator.source=<name>"),
            ("reading", Reading, "allocator.reading.average=<name>"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise UsageError(f"{name} is a component, not a value", got=repr(value), fix=fix)
        given = self.strength
        if given != "auto" and not (isinstance(given, int | float) and math.isfinite(given) and given >= 0):
            raise UsageError("strength is how far a block may move", got=given, allowed=">= 0, or auto")
        if self.control not in CONTROLS:
            raise UsageError("Unknown control", got=self.control, allowed=", ".join(CONTROLS))
        strengths = self.grid if isinstance(self.grid, list) else []
        if not strengths or not all(isinstance(x, int | float) and 0 <= x < math.inf for x in strengths):
            raise UsageError("grid is a list of strengths", got=self.grid, allowed="numbers >= 0", fix="grid=[0,0.2]")
        check_whole("windows", self.windows, or_null=True)
        check_whole("seeds", self.seeds)

    def check(self, wanted: float, num_blocks: int) -> None:
        self.inner.check(wanted, num_blocks)

    def allocate(self, layers: LayerTable, wanted: float, context: Context) -> SparsityPlan:
        base = self.inner.allocate(layers, wanted, context)
        if wanted == 0:
            return base
        source = self.source
        if isinstance(source, Pruned) and source.sparsity is None:
            source = replace(source, sparsity=wanted)
        drift = context.drift(source, self.windows, self.seeds)
        shift = self._direction(drift, context.seed)
        notes = {"r": absorption(drift, self.reading).r.tolist(), "correction": shift.tolist()}
        notes |= {f"inner.{name}": value for name, value in base.notes.items()}
        if self.strength != "auto":
            plan = corrected(base, shift, float(self.strength), layers, wanted)
            return SparsityPlan(plan.targets, plan.ledger, base.trials, notes)
        return self._search(base, shift, layers, wanted, context, notes)

    def _direction(self, drift: Drift, seed: int) -> Float[ndarray, " blocks"]:
        """D over its largest possible size, or what the control puts in its place."""
        direction: Float[ndarray, " blocks"] = absorption(drift, self.reading).D.numpy() / (2 * self.reading.clip)
        if self.control == "flipped":
            return -direction
        if self.control == "permuted":
            return np.random.default_rng(seed).permutation(direction)
        if self.control == "first":
            return direction * (np.arange(len(direction)) == 0)
        if self.control == "ramp":
            ramp = np.linspace(-1.0, 1.0, len(direction))
            return ramp * np.sqrt((direction**2).mean() / (ramp**2).mean())
        return direction

    def _search(
        self,
        base: SparsityPlan,
        shift: Float[ndarray, " blocks"],
        layers: LayerTable,
        wanted: float,
        context: Context,
        notes: dict[str, object],
    ) -> SparsityPlan:
        plans = {strength: corrected(base, shift, strength, layers, wanted) for strength in self.grid}
        scores = {strength: finite_or_none(context, plan) for strength, plan in plans.items()}
        finite = {strength: score for strength, score in scores.items() if score is not None}
        if not finite:
            raise NumericsError("No strength of the grid gave a finite perplexity", got=scores, fix="a lower sparsity")
        best = min(finite, key=lambda strength: finite[strength])
        trials = tuple({"strength": x, "heldout_perplexity": y} for x, y in scores.items())
        return SparsityPlan(
            plans[best].targets, plans[best].ledger, (*base.trials, *trials), {**notes, "strength": best}
        )


def corrected(
    base: SparsityPlan, shift: Float[ndarray, " blocks"], strength: float, layers: LayerTable, wanted: float
) -> SparsityPlan:
    """The base plan with every block moved by `strength` times its entry of `shift`, at the same budget."""
    if strength == 0:
        return base
    now = base.sparsities()
    by_name = layers.spread((strength * shift).tolist())
    return fit_plan(layers, {name: now[name] + by_name[name] for name in now}, wanted)
