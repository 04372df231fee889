"""What allocators with a search share: try plans on a screen, log every trial, run the best again in full."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import spearmanr

from sparsify.allocators.base import Allocator, Context
from sparsify.budget import fit_plan
from sparsify.errors import NumericsError, UsageError
from sparsify.search.algorithms import ALGORITHMS
from sparsify.search.spaces import Space
from sparsify.types import LayerTable, SparsityPlan

Trial = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Searching:
    """How a search tries plans.

    Attributes:
        algorithm: one of `search.algorithms`.
        trials: plans tried on the screen.
        statistics: of the screen's masks. `dense`: ranks of the dense model, milliseconds a trial. `propagated`: a
            pruning walk for every trial, as the cell itself does it.
        windows: calibration windows of the screen; None for all.
        heldout: held-out windows a trial is scored on; None for all.
        finalists: plans that are run again in full (the cell's pruner, all windows) to choose the winner: the better
            half of them are the best trials, the others are spread over all trials to show how the two rankings agree.
    """

    algorithm: Literal["grid", "golden", "random", "tpe", "evolution"] = "evolution"
    trials: int = 200
    statistics: Literal["dense", "propagated"] = "dense"
    windows: int | None = 24
    heldout: int | None = 16
    finalists: int = 6

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError("Unknown search algorithm", got=self.algorithm, allowed=", ".join(ALGORITHMS))
        if self.statistics not in ("dense", "propagated"):
            raise UsageError("Unknown statistics of a trial", got=self.statistics, allowed="dense, propagated")
        for name in ("trials", "finalists"):
            if getattr(self, name) < 2:
                raise UsageError(f"{name} is a number of plans", got=getattr(self, name), allowed=">= 2")

    def best_plan(self, layers: LayerTable, wanted: float, context: Context, space: Space) -> SparsityPlan:
        """The finalist with the lowest held-out perplexity, with the log of all trials and how the rankings agree."""
        log, plans = self._screened(layers, wanted, context, space)
        order = sorted(range(len(log)), key=lambda i: _or_infinite(log[i]["heldout_perplexity"]))
        rerun = {i: context.objective(plans[i]) for i in self._chosen(order)}
        best = min(rerun, key=lambda i: rerun[i])
        if not math.isfinite(rerun[best]):
            raise NumericsError("No plan of the search gave a finite perplexity", got=rerun, fix="a lower sparsity")
        pairs = [(_or_infinite(log[i]["heldout_perplexity"]), full) for i, full in rerun.items()]
        notes = {
            "finalists": [{"trial": i, "screened": a, "full": b} for i, (a, b) in zip(rerun, pairs, strict=True)],
            "rank_correlation": float(spearmanr(pairs).statistic) if len(pairs) > 2 else None,
        }
        return SparsityPlan(plans[best].targets, plans[best].ledger, tuple(log), notes)

    def _screened(
        self, layers: LayerTable, wanted: float, context: Context, space: Space
    ) -> tuple[list[Trial], list[SparsityPlan]]:
        log: list[Trial] = []
        plans: list[SparsityPlan] = []
        text, start = context.heldout_tokens(self.heldout), time.perf_counter()
        with context.screen(self.windows) as screen:
            if self.statistics == "dense":
                screen.settle(dict.fromkeys((layer.name for layer in layers), 0.0))
            prune = screen.apply if self.statistics == "dense" else screen.settle

            def objective(point: Float[ndarray, " dim"]) -> float:
                plan = fit_plan(layers, space.profile(point), wanted)
                prune(plan.sparsities())
                loss = screen.loss(text)
                plans.append(plan)
                log.append({"heldout_perplexity": _perplexity(loss), "seconds": time.perf_counter() - start})
                context.progress(len(log), self.trials)
                return loss

            ALGORITHMS[self.algorithm](objective, space, self.trials, np.random.default_rng(context.seed))
        return log, plans

    def _chosen(self, order: list[int]) -> list[int]:
        """The best trials, and as many spread evenly over the ranking of the rest."""
        top = order[: -(-self.finalists // 2)]
        rest = order[len(top) :]
        count = min(self.finalists - len(top), len(rest))
        return top + [rest[round(i)] for i in np.linspace(0, len(rest) - 1, count)]


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def rule_profiles(
    rules: Mapping[str, Allocator], layers: LayerTable, wanted: float, context: Context
) -> list[dict[str, float]]:
    """What each rule would do, as sparsity by layer name."""
    return [rule.allocate(layers, wanted, context).sparsities() for rule in rules.values()]
