"""What allocators with an evolution share: the meaning of a genome, its fitness, the checkpoint, the winner as a plan.

No torch at the top: a plan refuses what is impossible without loading any.
"""

from __future__ import annotations

import json
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import HIGH, check_widths, weighted_mean
from sparsify.allocators.profile import Profile
from sparsify.errors import BudgetError, NumericsError, PatternError, UsageError
from sparsify.search.budgets import Budget, Genome
from sparsify.search.evolution import Evolution, Scheme
from sparsify.types import LayerSpec, LayerTable, Pattern, Target, check_whole

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sparsify.allocators.context import Context
    from sparsify.search.proxy import Proxy


@dataclass(frozen=True)
class Levels:
    """Groups of layers that share a level, and what levels mean.

    Attributes:
        members: the layers of every gene.
        budget: what all genomes keep.
        pattern: `mixed:M`, whose levels are kept counts; or unstructured: steps of sparsity below `sparsity`.
        sparsity: the budget.
        step: of the grid of an unstructured pattern.
    """

    members: tuple[tuple[LayerSpec, ...], ...]
    budget: Budget
    pattern: Pattern
    sparsity: float
    step: float

    def target(self, level: int) -> Target:
        """What a level asks of a layer."""
        if self.pattern.group is None:
            return Target(min(max(self.sparsity - level * self.step, 0.0), 1.0))
        return Target(1 - level / self.pattern.group, level, self.pattern.group)

    def targets(self, genome: Genome) -> dict[str, Target]:
        """A target for every layer by name."""
        return {x.name: self.target(n) for n, group in zip(genome, self.members, strict=True) for x in group}

    def nearest(self, sparsities: Mapping[str, float]) -> list[int]:
        """The level nearest to each group's mean sparsity, whatever they add up to."""
        means = [weighted_mean([sparsities[x.name] for x in g], [x.numel for x in g]) for g in self.members]
        group = self.pattern.group
        return [round((self.sparsity - s) / self.step if group is None else group * (1 - s)) for s in means]


@dataclass(frozen=True, kw_only=True)
class Evolving(Allocator):
    """An allocator that evolves levels on held-out text.

    A candidate is tried on the dense model by `Context.level_proxy`: the masks (or, of pruners that update weights, the
    stored weights) that the cell's pruner gives on `dense` statistics. Unstructured levels are tried under Wanda's
    masks by rank, as all searches here are. The cell then prunes by the winner as by any plan.

    The budget is exact: the weights kept are as many for every candidate, and as near to what was asked for as whole
    levels can come (`search.budgets`).

    Attributes:
        groups: a level per `block` or per `layer` (matrix).
        low: fewest kept of M, or lowest step of the grid; None for the default bounds.
        high: most.
        generations: after the first.
        patience: generations without a gain before it stops.
        fitness: mean `loss` on held-out text, or `kl` from the dense model's predictions.
        tokens: held-out tokens of each stage of measuring, as far as there are any.
        survivors: candidates that go on from each stage but the last.
        windows: calibration windows of the statistics; None for all.
        store: where weights of all levels are kept, if they have to be: `memory` or `disk`.
    """

    groups: Literal["block", "layer"] = "block"
    low: int | None = None
    high: int | None = None
    generations: int = 30
    patience: int = 10
    fitness: Literal["loss", "kl"] = "loss"
    tokens: Sequence[int] = field(default_factory=lambda: [2048, 8192, 16384])
    survivors: Sequence[int] = field(default_factory=lambda: [16, 8])
    windows: int | None = 24
    store: Literal["memory", "disk"] = "memory"

    def __post_init__(self) -> None:
        _check_choice("groups", self.groups, "block", "layer")
        _check_choice("fitness", self.fitness, "loss", "kl")
        _check_choice("store", self.store, "memory", "disk")
        check_whole("windows", self.windows, or_null=True)
        for count in self.tokens:
            check_whole("a stage's tokens", count)
        if len(self.tokens) != len(self.survivors) + 1 or list(self.tokens) != sorted(self.tokens):
            raise UsageError(
                "Each stage has more tokens than the one before, and each but the last a number of survivors",
                got=f"tokens={list(self.tokens)}, survivors={list(self.survivors)}",
                fix="allocator.tokens=[2048,16384] allocator.survivors=[8]",
            )
        self.scheme(list(self.survivors))

    @abstractmethod
    def scheme(self, survivors: Sequence[int]) -> Scheme:
        """How the population goes on, with these survivors."""

    @abstractmethod
    def first(self, levels: Levels, layers: LayerTable, context: Context, rng: np.random.Generator) -> list[Genome]:
        """The first generation."""

    def steps(self) -> float:
        """The grid of an unstructured pattern."""
        return 0.0

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        levels = levels_of(layers, sparsity, context.pattern, self.groups, self.steps(), self.low, self.high)
        evolution = self._evolved(levels, layers, context)
        genome, loss = evolution.best
        if not math.isfinite(loss):
            raise NumericsError("No candidate of the search gave a finite loss", got=loss, fix="a lower sparsity")
        notes = {"levels": list(genome), "evaluations": len(evolution.memo), f"heldout_{self.fitness}": loss}
        values = {name: target.sparsity for name, target in levels.targets(genome).items()}
        return Profile(values, levels=True, high=1.0, notes=notes, trials=tuple(self._trials(evolution)))

    def _trials(self, evolution: Evolution) -> list[dict[str, float | None]]:
        """The best so far after each generation, against evaluations and seconds."""
        return [
            {
                **row,
                "loss": row["loss"] if math.isfinite(row["loss"]) else None,
                "heldout_perplexity": math.exp(row["loss"]) if self.fitness == "loss" and row["loss"] < 700 else None,
            }
            for row in evolution.history
        ]

    def _evolved(self, levels: Levels, layers: LayerTable, context: Context) -> Evolution:
        from sparsify.model.objective import batch_size_for
        from sparsify.search.fitness import Fitness, stages

        text, began = context.heldout_inputs(), time.perf_counter()
        counts, survivors = stages(self.tokens, self.survivors, text.length, len(text))
        evolution, spent = self._begun(levels, layers, context, self.scheme(survivors))
        model, size = context.view.model, batch_size_for(context.view.device, text.length)
        fitness = Fitness(model, text, counts, context.objective, self.fitness, size)
        with self._proxy(levels, context) as proxy:
            while asked := evolution.ask():
                context.progress("generation", evolution.generation, self.generations + 1)
                losses = []
                for genome in asked:
                    proxy.apply(levels.targets(genome))
                    losses.append(fitness(evolution.stage))
                seconds = spent + time.perf_counter() - began
                if evolution.tell(losses, seconds) and context.checkpoint is not None:
                    saved = {"question": self._question(levels, context), "seconds": seconds}
                    context.checkpoint.save(saved | {"search": evolution.state()})
        context.progress("generation", self.generations + 1, self.generations + 1)
        return evolution

    def _begun(self, levels: Levels, layers: LayerTable, context: Context, scheme: Scheme) -> tuple[Evolution, float]:
        """The search from its start, or from where a killed run left it, and the seconds that it has had."""
        saved = context.checkpoint.load() if context.checkpoint is not None else None
        if isinstance(saved, Mapping) and saved.get("question") == self._question(levels, context):
            evolution = Evolution(levels.budget, scheme, [], context.seed)
            evolution.resume(saved["search"])
            return evolution, float(saved["seconds"])
        first = self.first(levels, layers, context, np.random.default_rng([context.seed, 1]))
        return Evolution(levels.budget, scheme, first, context.seed), 0.0

    def _question(self, levels: Levels, context: Context) -> str:
        """What a saved search must have been asked for to be gone on with."""
        texts = [context.calibration.digest, context.heldout_inputs().digest]
        return json.dumps([repr(self), repr(context.pruner), repr(levels), context.seed, texts])

    def _proxy(self, levels: Levels, context: Context) -> AbstractContextManager[Proxy]:
        if levels.pattern.group is not None:
            wanted = range(min(levels.budget.low), max(levels.budget.high) + 1)
            return context.level_proxy(self.windows, wanted, self.store)
        return context.dense_proxy(self.windows)


def levels_of(
    layers: LayerTable,
    sparsity: float,
    pattern: Pattern,
    groups: str,
    step: float,
    low: int | None = None,
    high: int | None = None,
) -> Levels:
    """What genomes mean for a model: a gene for each block or layer, bounds, and the exact budget.

    Raises:
        PatternError: M does not divide a layer's inputs.
        BudgetError: no room within the bounds.
    """
    if pattern.group is not None:
        check_widths(layers, pattern.group)
    bounds = level_bounds(sparsity, pattern, step, low, high)
    owners = [layer.block if groups == "block" else i for i, layer in enumerate(layers)]
    members = tuple(
        tuple(x for x, own in zip(layers, owners, strict=True) if own == owner) for owner in sorted(set(owners))
    )
    sizes = [sum(layer.numel for layer in group) for group in members]
    mean = Fraction(0) if pattern.group is None else mean_level(sparsity, pattern.group)
    budget = Budget.nearest(sizes, [bounds[0]] * len(sizes), [bounds[1]] * len(sizes), mean)
    return Levels(members, budget, pattern, sparsity, step)


def mean_level(sparsity: float, group: int) -> Fraction:
    """Kept of M on average: the fraction that was typed, not its binary neighbour."""
    return group * (1 - Fraction(sparsity).limit_denominator(10**9))


def level_bounds(sparsity: float, pattern: Pattern, step: float, low: int | None, high: int | None) -> tuple[int, int]:
    """Fewest and most kept of M; of an unstructured grid the lowest and highest step.

    By default N is within M/4 of the mean, rounded outwards, and at least 1: for M = 8 that is 1..4 at 75% and 2..6 at
    50%, as our notes on MSP have it; the rule for other M and means is ours. A grid goes from dense to 0.99.

    Raises:
        BudgetError: the mean is not between the bounds, so that no gene could give another one anything.
    """
    M = pattern.group
    if M is None:
        lowest, highest = -math.floor((HIGH - sparsity) / step + 1e-9), math.floor(sparsity / step + 1e-9)
        mean, keeps = Fraction(0), "steps of the grid"
    else:
        mean, keeps = mean_level(sparsity, M), f"kept of {M}"
        lowest, highest = max(1, math.floor(mean - Fraction(M, 4))), min(M, math.ceil(mean + Fraction(M, 4)))
    least, most = lowest if low is None else low, highest if high is None else high
    if not (1 if M else lowest) <= least <= most <= (M or highest):
        allowed = f"1 <= low <= high <= {M}" if M else f"{lowest} <= low <= high <= {highest}"
        raise BudgetError(f"The bounds are out of range ({keeps})", got=f"low={least}, high={most}", allowed=allowed)
    if not least < mean < most:
        reach = f"{1 - most / M:g} < sparsity < {1 - least / M:g}" if M else f"low < 0 < high, in {keeps}"
        raise BudgetError(
            "The budget leaves a search no room to move weights between groups",
            got=f"sparsity={sparsity:g}: a mean of {float(mean):g} {keeps}, bounds {least} to {most}",
            allowed=reach,
            fix=f"pattern=mixed:{2 * M}, or another sparsity" if M else "another sparsity",
        )
    return least, most


def check_mixed(node: Mapping[str, Any], sparsity: float, num_blocks: int, pattern: Pattern) -> None:
    """Refuse a pattern that has no N to choose, and a budget without room.

    Raises:
        PatternError: not mixed:M.
        BudgetError: no room within the bounds.
    """
    refuse_unmixed(pattern)
    check_room_of_levels(node, sparsity, num_blocks, pattern)


def check_room_of_levels(node: Mapping[str, Any], sparsity: float, num_blocks: int, pattern: Pattern) -> None:
    """Refuse a budget that leaves genes no room.

    Raises:
        BudgetError: no room within the bounds.
    """
    if sparsity > 0 and pattern.kept is None:
        level_bounds(sparsity, pattern, float(node.get("step", 0.05)), node.get("low"), node.get("high"))


def refuse_unmixed(pattern: Pattern) -> None:
    """Raise unless every layer may have its own N of M.

    Raises:
        PatternError: it may not.
    """
    if pattern.group is None or pattern.kept is not None:
        raise PatternError(
            "This allocator chooses how many of every M weights each block keeps",
            got=f"pattern={pattern}",
            allowed="pattern=mixed:M",
            fix="pattern=mixed:8",
        )


def _check_choice(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UsageError(f"Unknown {name}", got=value, allowed=", ".join(allowed))
