"""EvoPress: one parent, many offspring by level switches, measured on more and more text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsify.allocators.evolving import Evolving, Levels
from sparsify.errors import UsageError
from sparsify.search.budgets import Genome
from sparsify.search.evolution import Scheme, exchanged, repaired
from sparsify.types import LayerTable, check_whole

if TYPE_CHECKING:
    from sparsify.allocators.context import Context


@dataclass(frozen=True, kw_only=True)
class EvoPress(Evolving):
    """A (1 + lambda) evolution of the level of every matrix, from the uniform plan.

    Source: EvoPress (arXiv 2410.14649) and its released settings for pruning: 64 offspring, survivors 8, 2, 1 on 2,048,
    16,384 and 65,536 tokens, 400 generations, KL to the dense model; the number of switches of an offspring is the
    smaller of two draws from 1 to 3; the parent competes on the last stage.

    Deviations: a level is a step of the matrix's own sparsity (5%) or of N of M, where the release moves equally many
    weights in every matrix: switches between unequal matrices are paid for by as few others as add up exactly. The text
    of a stage is the same in every generation, so that the parent is not measured again. Unstructured candidates are
    Wanda masks by rank, where the release stores SparseGPT's weights. The first offspring are measured like all others.

    Attributes:
        offspring: of every generation.
        switches: fewest and most of an offspring.
        step: of the sparsity grid of an unstructured pattern.
    """

    groups: Literal["block", "layer"] = "layer"
    generations: int = 400
    patience: int = 400
    fitness: Literal["loss", "kl"] = "kl"
    tokens: Sequence[int] = field(default_factory=lambda: [2048, 16384, 65536])
    survivors: Sequence[int] = field(default_factory=lambda: [8, 2])
    offspring: int = 64
    switches: Sequence[int] = field(default_factory=lambda: [1, 3])
    step: float = 0.05
    version: int = 1

    def __post_init__(self) -> None:
        check_whole("offspring", self.offspring)
        super().__post_init__()
        if not 0 < self.step < 1:
            raise UsageError("step is a part of a matrix's weights", got=self.step, allowed="0 < step < 1")

    def scheme(self, survivors: Sequence[int]) -> Scheme:
        return Scheme(
            population=1 + self.offspring,
            generations=self.generations,
            elites=1,
            crossover=0.0,
            mutation=None,
            exchanges=tuple(self.switches),  # type: ignore[arg-type]
            patience=self.patience,
            survivors=tuple(survivors),
        )

    def steps(self) -> float:
        return self.step

    def first(self, levels: Levels, layers: LayerTable, context: Context, rng: np.random.Generator) -> list[Genome]:
        uniform = levels.nearest(dict.fromkeys((layer.name for layer in layers), levels.sparsity))
        parent = repaired(levels.budget, uniform, rng)
        counts = rng.integers(self.switches[0], self.switches[1] + 1, size=(self.offspring, 2)).min(axis=1)
        return [parent, *(exchanged(levels.budget, parent, int(count), rng) for count in counts)]
