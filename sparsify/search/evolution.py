"""Evolution of genomes that all keep one budget: ask for what is to be measured, tell what came out. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparsify.errors import UsageError
from sparsify.search.budgets import Budget, Genome
from sparsify.types import check_whole

TRIES = 20
"""Draws for a child that its generation does not have yet."""


@dataclass(frozen=True)
class Scheme:
    """How a population goes on.

    Attributes:
        population: genomes of the first generation; each later one is the elites and as many children as that leaves.
        generations: after the first.
        elites: the best measured on the last stage, kept and bred from.
        breeding: `genetic`: crossover and mutation of elites; `random`: children are drawn anew, the control.
        crossover: share of children with two parents: each gene is one parent's or the other's, then the budget is
            repaired by moving random genes by one level.
        mutation: chance of every gene to start an exchange; None draws their number instead, the smaller of two uniform
            draws from `exchanges` (EvoPress).
        exchanges: fewest and most exchanges of a child.
        patience: generations without a gain before it stops.
        survivors: how many go on from each stage of measuring but the last.
    """

    population: int = 50
    generations: int = 30
    elites: int = 10
    breeding: Literal["genetic", "random"] = "genetic"
    crossover: float = 0.5
    mutation: float | None = 0.1
    exchanges: tuple[int, int] = (1, 3)
    patience: int = 10
    survivors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in {"population": 2, "generations": 0, "elites": 1, "patience": 1}.items():
            check_whole(name, getattr(self, name), least)
        for count in (*self.survivors, *self.exchanges):
            check_whole("a number of survivors or exchanges", count)
        if self.elites >= self.population:
            raise UsageError(
                "Elites leave no room for children",
                got=f"elites={self.elites}, population={self.population}",
                allowed="elites < population",
                fix=f"elites={max(1, self.population // 5)}",
            )
        if self.breeding not in ("genetic", "random"):
            raise UsageError("Unknown breeding", got=self.breeding, allowed="genetic, random")
        if not (0 <= self.crossover <= 1 and (self.mutation is None or 0 <= self.mutation <= 1)):
            got = f"crossover={self.crossover}, mutation={self.mutation}"
            raise UsageError("crossover and mutation are chances", got=got, allowed="0 to 1")
        if len(self.exchanges) != 2 or self.exchanges[0] > self.exchanges[1]:
            raise UsageError("exchanges are the fewest and the most", got=self.exchanges, fix="exchanges=[1,3]")


def exchange(budget: Budget, genome: Genome, rng: np.random.Generator) -> Genome:
    """A random gene one level up or down, and what pays for that: with genes of one size, another the other way.

    Where sizes differ the payers are the first of a random order whose moves of one level add up exactly: a large
    matrix against several small ones, say. A genome that allows no such move is returned as it is.
    """
    step = 1 if rng.integers(2) else -1
    order = rng.permutation(len(genome)).tolist()
    for signed in (step, -step):
        for gene in order:
            moved = genome[gene] + signed
            if budget.low[gene] <= moved <= budget.high[gene]:
                payers = [other for other in order if other != gene]
                found = budget.settled((*genome[:gene], moved, *genome[gene + 1 :]), payers[::-1])
                if found is not None:
                    return found
    return genome


def exchanged(budget: Budget, genome: Genome, times: int, rng: np.random.Generator) -> Genome:
    """Several exchanges, one after the other."""
    for _ in range(times):
        genome = exchange(budget, genome, rng)
    return genome


def crossed(budget: Budget, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
    """Uniform crossover, then moves of one level in random genes until the budget is met."""
    mixed = [a if coin else b for a, b, coin in zip(one, other, rng.integers(2, size=len(one)), strict=True)]
    return repaired(budget, mixed, rng)


def drawn(budget: Budget, rng: np.random.Generator) -> Genome:
    """Levels drawn uniformly within the bounds, then moved onto the budget."""
    return repaired(budget, [int(rng.integers(a, b + 1)) for a, b in zip(budget.low, budget.high, strict=True)], rng)


def repaired(budget: Budget, levels: Sequence[int], rng: np.random.Generator) -> Genome:
    """The levels within their bounds and on the budget, random genes moved by as little as does."""
    found = budget.settled(budget.clipped(levels), rng.permutation(len(budget)).tolist())
    assert found is not None  # all genes together reach the total
    return found


def neighbours(
    budget: Budget, seed: Genome, count: int, fewest: int, most: int, rng: np.random.Generator
) -> list[Genome]:
    """The seed and `count` - 1 others, each some exchanges away from it (fewest to most, uniformly)."""
    others = [exchanged(budget, seed, int(rng.integers(fewest, most + 1)), rng) for _ in range(count - 1)]
    return [seed, *others]


class Evolution:
    """A population on its way to lower losses, measured in stages: many genomes on little text, survivors on more.

    `ask` names genomes that are to be measured, `tell` takes their losses. A genome is asked for once a stage at most.
    Elites are compared on the last stage alone. All choices are drawn from the seed, so equal losses give equal
    searches; `state` and `resume` carry one over to another process without a difference.

    Args:
        budget: what every genome keeps.
        scheme: how it goes on.
        first: the first generation.
        seed: of all draws.

    Raises:
        UsageError: a genome of the first generation is off the budget.
    """

    def __init__(self, budget: Budget, scheme: Scheme, first: Sequence[Genome], seed: int) -> None:
        if wrong := [genome for genome in first if not budget.holds(genome)]:
            raise UsageError("A genome of the first generation is off the budget", got=wrong[0])
        self.budget, self.scheme = budget, scheme
        self.rng = np.random.default_rng(seed)
        self.candidates = list(dict.fromkeys(first))
        self.elites: list[Genome] = []
        self.generation = self.stage = self.stale = 0
        self.memo: dict[tuple[int, Genome], float] = {}
        self.history: list[dict[str, float]] = []

    @property
    def last_stage(self) -> int:
        return len(self.scheme.survivors)

    @property
    def done(self) -> bool:
        return self.generation > self.scheme.generations or self.stale >= self.scheme.patience

    @property
    def best(self) -> tuple[Genome, float]:
        """The best genome so far and its loss on the last stage; there is one once a generation is over."""
        return self.elites[0], self.memo[self.last_stage, self.elites[0]]

    def ask(self) -> list[Genome]:
        """Genomes to be measured at `stage`; none when the search is over."""
        return [] if self.done else [g for g in self.candidates if (self.stage, g) not in self.memo]

    def tell(self, losses: Sequence[float], seconds: float = 0.0) -> bool:
        """Take the losses of what was asked for, and go on until something is to be measured again.

        Args:
            losses: in the order asked; infinite for a broken model.
            seconds: since the start of the search, for the history.

        Returns:
            Whether a generation was finished: the time to save `state`.
        """
        before = self.generation
        for genome, loss in zip(self.ask(), losses, strict=True):
            self.memo[self.stage, genome] = math.inf if math.isnan(loss) else float(loss)
        while not self.done and not self.ask():
            self._advance(seconds)
        return self.generation > before

    def _advance(self, seconds: float) -> None:
        """The best of this stage go on to the next one; after the last, the next generation."""
        if self.stage < self.last_stage:
            self.candidates = self._ranked(self.candidates)[: self.scheme.survivors[self.stage]]
            self.stage += 1
            return
        before = self.best[1] if self.elites else math.inf
        pool = list(dict.fromkeys([*self.elites, *self.candidates]))
        self.elites = self._ranked(pool)[: self.scheme.elites]
        self.stale = 0 if self.best[1] < before or self.generation == 0 else self.stale + 1
        counts = {"generation": float(self.generation), "evaluations": float(len(self.memo))}
        self.history.append(counts | {"seconds": seconds, "loss": self.best[1]})
        self.generation, self.stage = self.generation + 1, 0
        self.candidates = [] if self.done else self._children()

    def _ranked(self, genomes: Sequence[Genome]) -> list[Genome]:
        """Lowest loss of this stage first, the earlier of equals first."""
        return sorted(genomes, key=lambda genome: self.memo[self.stage, genome])

    def _children(self) -> list[Genome]:
        children: dict[Genome, None] = {}
        for _ in range(self.scheme.population - self.scheme.elites):
            for _ in range(TRIES):
                child = self._child()
                if child not in children and child not in self.elites:
                    break
            children[child] = None
        return list(children)

    def _child(self) -> Genome:
        if self.scheme.breeding == "random":
            return drawn(self.budget, self.rng)
        one = self._elite()
        if len(self.elites) > 1 and self.rng.random() < self.scheme.crossover:
            one = crossed(self.budget, one, self._elite(), self.rng)
        return exchanged(self.budget, one, self._exchanges(), self.rng)

    def _elite(self) -> Genome:
        return self.elites[int(self.rng.integers(len(self.elites)))]

    def _exchanges(self) -> int:
        fewest, most = self.scheme.exchanges
        if self.scheme.mutation is None:
            return int(self.rng.integers(fewest, most + 1, size=2).min())
        return min(max(int(self.rng.binomial(len(self.budget), self.scheme.mutation)), fewest), most)

    def state(self) -> str:
        """Everything that a search is, as JSON."""
        memo = [[stage, genome, loss] for (stage, genome), loss in self.memo.items()]
        own = {name: getattr(self, name) for name in ("candidates", "elites", *COUNTS, "history")}
        return json.dumps(own | {"memo": memo, "rng": self.rng.bit_generator.state})

    def resume(self, state: str) -> None:
        """Become the search that `state` was taken of; budget and scheme must be the same."""
        tree: Mapping[str, Any] = json.loads(state)
        self.candidates, self.elites = ([tuple(g) for g in tree[name]] for name in ("candidates", "elites"))
        self.generation, self.stage, self.stale = (int(tree[name]) for name in COUNTS)
        self.history = list(tree["history"])
        self.memo = {(stage, tuple(genome)): loss for stage, genome, loss in tree["memo"]}
        self.rng.bit_generator.state = tree["rng"]


COUNTS = ("generation", "stage", "stale")
