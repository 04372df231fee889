"""Absorption-aware correction: prune more where later blocks absorb what pruning disturbs."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsify.allocators.base import Allocator, finite_or_none
from sparsify.allocators.context import Context
from sparsify.allocators.owl import OWL
from sparsify.allocators.profile import Profile
from sparsify.analysis.absorption import Reading, absorption
from sparsify.analysis.drift import Drift, drift
from sparsify.analysis.perturbation import PrunedBlock, Source
from sparsify.data.inputs import first
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable, check_whole

MOST_DRAWS = 10_000
CONTROLS = ("none", "flipped", "permuted", "ramp", "first")


@dataclass(frozen=True)
class AbsorptionCorrected(Allocator):
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
    source: Source = field(default_factory=PrunedBlock)
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
        check_whole("seeds", self.seeds, most=MOST_DRAWS)

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        inner = self.inner.profile(layers, sparsity, context)
        drift = self._drift(sparsity, context)
        direction = self._direction(drift, context.seed)
        notes = {"r": absorption(drift, self.reading).r.tolist(), "correction": direction.tolist()}
        notes |= {f"inner.{name}": value for name, value in inner.notes.items()}
        if self.strength != "auto":
            profile = corrected(inner, direction, float(self.strength), layers, sparsity)
            return replace(profile, trials=inner.trials, notes=notes)
        return self._search(inner, direction, layers, sparsity, context, notes)

    def _drift(self, sparsity: float, context: Context) -> Drift:
        """What becomes of a disturbance of each block, on the first calibration inputs."""
        source = self.source
        if isinstance(source, PrunedBlock) and source.sparsity is None:
            source = replace(source, sparsity=sparsity)
        inputs = first(context.calibration, self.windows)
        return context.once(  # type: ignore[no-any-return]
            ("drift", source, self.windows, self.seeds),
            lambda: drift(
                context.view,
                inputs,
                source,
                seeds=self.seeds,
                batch_size=context.batch_size,
                progress=context.progress,
            ),
        )

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
        inner: Profile,
        direction: Float[ndarray, " blocks"],
        layers: LayerTable,
        sparsity: float,
        context: Context,
        notes: dict[str, object],
    ) -> Profile:
        profiles = {strength: corrected(inner, direction, strength, layers, sparsity) for strength in self.grid}
        scores: dict[float, float | None] = {}
        context.progress("trial", 0, len(profiles))
        for strength, profile in profiles.items():
            scores[strength] = finite_or_none(context, profile.fitted(layers, sparsity))
            context.progress("trial", len(scores), len(profiles))
        finite = {strength: score for strength, score in scores.items() if score is not None}
        if not finite:
            raise NumericsError("No strength of the grid gave a finite perplexity", got=scores, fix="a lower sparsity")
        best = min(finite, key=lambda strength: finite[strength])
        trials = tuple({"strength": x, "heldout_perplexity": y} for x, y in scores.items())
        return replace(profiles[best], trials=(*inner.trials, *trials), notes={**notes, "strength": best})


def corrected(
    inner: Profile, direction: Float[ndarray, " blocks"], strength: float, layers: LayerTable, sparsity: float
) -> Profile:
    """The inner plan with every block moved by `strength` times its entry of `direction`; at strength 0 as it is."""
    if strength == 0:
        return inner
    now = inner.fitted(layers, sparsity).sparsities()
    by_name = layers.spread((strength * direction).tolist())
    return Profile({name: now[name] + by_name[name] for name in now})
