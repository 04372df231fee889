"""MSP: an evolution of mixed N:M levels that starts from Fisher sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsify.allocators.base import Allocator, allocate
from sparsify.allocators.evolving import Evolving, Levels, refuse_unmixed
from sparsify.allocators.profile import Profile
from sparsify.allocators.uniform import Uniform
from sparsify.errors import UsageError
from sparsify.search.budgets import Genome
from sparsify.search.evolution import Scheme, drawn, neighbours, repaired
from sparsify.types import LayerTable, check_whole

if TYPE_CHECKING:
    from sparsify.allocators.context import Context

STARTS = ("fisher", "uniform", "random", "rule")


@dataclass(frozen=True, kw_only=True)
class MSP(Evolving):
    """Kept counts N of M for every block, evolved at a constant number of weights; the start knows the sensitivities.

    Source: MSP (arXiv 2503.11164), of which no code was released. From its abstract: blocks differ in sensitivity,
    measured by the trace of the Fisher information; an evolution whose first population is built from it picks mixed
    N:M levels; crossover and mutation keep the budget. All numbers and the rest of the structure are our reading: the
    seed genome has one level more in the third of the groups with the largest trace and one less in that with the
    smallest; the others of the first generation are some exchanges away from it (1 to a quarter of the genes); elites
    are kept, children crossed uniformly and repaired by single levels, mutated by exchanges. Candidates are masked, or
    taken from a store of levels, on the dense model's statistics; fitness is the loss on held-out calibration text,
    staged.

    Attributes:
        start: of the first generation: `fisher`, `uniform`, `random` (every genome drawn), or `rule`.
        rule: the allocator whose plan is the seed genome for `start=rule`.
        fisher_windows: calibration windows of the trace; None for all.
        sensitivity: of a group, the `sum` of the Fisher trace over its weights, or its `mean`.
        algorithm: `genetic`; or `random`, genomes drawn anew with as many evaluations, the control.
        population: genomes of a generation.
        elites: that are kept and bred from.
        crossover: share of children with two parents.
        mutation: chance of every gene to start an exchange ...
        exchanges: ... of which a child has at least and at most so many.
    """

    start: Literal["fisher", "uniform", "random", "rule"] = "fisher"
    rule: Allocator = field(default_factory=Uniform)
    sensitivity: Literal["sum", "mean"] = "sum"
    fisher_windows: int | None = None
    algorithm: Literal["genetic", "random"] = "genetic"
    population: int = 50
    elites: int = 10
    crossover: float = 0.5
    mutation: float = 0.1
    exchanges: Sequence[int] = field(default_factory=lambda: [1, 3])
    version: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("fisher_windows", self.fisher_windows, or_null=True)
        if self.start not in STARTS or self.sensitivity not in ("sum", "mean"):
            raise UsageError(
                "Unknown start or sensitivity",
                got=f"start={self.start}, sensitivity={self.sensitivity}",
                allowed=f"start: {', '.join(STARTS)}; sensitivity: sum, mean",
            )

    def scheme(self, survivors: Sequence[int]) -> Scheme:
        return Scheme(
            population=self.population,
            generations=self.generations,
            elites=self.elites,
            breeding=self.algorithm,
            crossover=self.crossover,
            mutation=self.mutation,
            exchanges=tuple(self.exchanges),  # type: ignore[arg-type]
            patience=self.patience,
            survivors=tuple(survivors),
        )

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        refuse_unmixed(context.pattern)
        return super().profile(layers, sparsity, context)

    def first(self, levels: Levels, layers: LayerTable, context: Context, rng: np.random.Generator) -> list[Genome]:
        if self.start == "random":
            return [drawn(levels.budget, rng) for _ in range(self.population)]
        seed = repaired(levels.budget, self._seed(levels, layers, context), rng)
        return neighbours(levels.budget, seed, self.population, 1, max(1, len(levels.budget) // 4), rng)

    def _seed(self, levels: Levels, layers: LayerTable, context: Context) -> list[int]:
        """The seed genome before it is moved onto the budget."""
        if self.start == "rule":
            return levels.nearest(allocate(self.rule, layers, levels.sparsity, context, context.pattern).sparsities())
        uniform = levels.nearest(dict.fromkeys((layer.name for layer in layers), levels.sparsity))
        if self.start == "uniform":
            return uniform
        from sparsify.allocators.fisher import sensitivities, thirds

        found = sensitivities(context, layers, self.fisher_windows, self.groups, self.sensitivity)
        return [n + step for n, step in zip(uniform, thirds(found), strict=True)]
