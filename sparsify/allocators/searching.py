"""What allocators with a search share: try plans on a proxy, log every trial, run the best again in full."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import spearmanr

from sparsify.allocators.base import Allocator, allocate, finite_or_none
from sparsify.allocators.profile import Profile
from sparsify.errors import NumericsError, UsageError
from sparsify.search.algorithms import ALGORITHMS
from sparsify.search.spaces import Space
from sparsify.types import LayerTable, Pattern, Target, check_whole

MOST_TRIALS = 1_000_000
"""Each trial is a plan in the log: more than these end in no time and no memory."""

if TYPE_CHECKING:
    from sparsify.allocators.context import Context

Trial = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Searching:
    """How a search tries plans.

    Attributes:
        algorithm: one of `search.algorithms`.
        trials: plans tried on the proxy.
        statistics: of the proxy's masks. `dense`: ranks of the dense model, milliseconds a trial. `propagated`: a
            pruning walk for every trial, as the cell itself does it.
        windows: calibration windows of the proxy; None for all.
        heldout: held-out windows a trial is scored on; None for all.
        finalists: plans that are run again in full (the cell's pruner, all windows) to choose the winner: the better
            half of them are the best trials, the others are spread over all trials to show how the two rankings agree.
        native: with an N:M pattern, try what plans round to, under masks by rank within groups of M (by the cell's own
            scores, if its pruner only ranks weights); else unstructured plans, of which the winner is rounded.
    """

    algorithm: Literal["grid", "golden", "random", "tpe", "evolution"] = "evolution"
    trials: int = 200
    statistics: Literal["dense", "propagated"] = "dense"
    windows: int | None = 24
    heldout: int | None = 16
    finalists: int = 6
    native: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError("Unknown search algorithm", got=self.algorithm, allowed=", ".join(ALGORITHMS))
        if self.statistics not in ("dense", "propagated"):
            raise UsageError("Unknown statistics of a trial", got=self.statistics, allowed="dense, propagated")
        for name, least in {"trials": 2, "finalists": 2, "windows": 1, "heldout": 1}.items():
            most = MOST_TRIALS if name == "trials" else None
            check_whole(name, getattr(self, name), least, most, or_null=name in ("windows", "heldout"))

    def best_profile(self, layers: LayerTable, sparsity: float, context: Context, space: Space) -> Profile:
        """The finalist with the lowest held-out perplexity, with the log of all trials and how the rankings agree."""
        log, profiles = self._tried(layers, sparsity, context, space)
        order = sorted(range(len(log)), key=lambda i: _or_infinite(log[i]["heldout_perplexity"]))
        chosen = self._chosen(order)
        rerun: dict[int, float | None] = {}
        context.progress("finalist", 0, len(chosen))
        for i in chosen:
            rerun[i] = finite_or_none(context, profiles[i].fitted(layers, sparsity))
            context.progress("finalist", len(rerun), len(chosen))
        best = min(rerun, key=lambda i: _or_infinite(rerun[i]))
        if rerun[best] is None:
            raise NumericsError("No plan of the search gave a finite perplexity", got=rerun, fix="a lower sparsity")
        finalists = [{"trial": i, "screened": log[i]["heldout_perplexity"], "full": full} for i, full in rerun.items()]
        notes = {"finalists": finalists, "rank_correlation": _agreement(finalists)}
        return replace(profiles[best], trials=tuple(log), notes=notes)

    def _tried(
        self, layers: LayerTable, sparsity: float, context: Context, space: Space
    ) -> tuple[list[Trial], list[Profile]]:
        """Every trial of the search on a proxy of the model, and what it tried."""
        log: list[Trial] = []
        profiles: list[Profile] = []
        text, start = context.heldout_inputs(self.heldout), time.perf_counter()
        pattern = context.pattern if self.native else Pattern()
        context.progress("trial", 0, self.trials)
        with context.proxy(self.windows, pattern) as proxy:
            if self.statistics == "dense":
                proxy.settle({layer.name: Target(0.0) for layer in layers})
            prune = proxy.apply if self.statistics == "dense" else proxy.settle

            def objective(point: Float[ndarray, " dim"]) -> float:
                profile = Profile(space.profile(point))
                prune(profile.fitted(layers, sparsity, pattern).targets)
                loss = proxy.loss(text)
                profiles.append(profile)
                log.append({"heldout_perplexity": _perplexity(loss), "seconds": time.perf_counter() - start})
                context.progress("trial", len(log), max(len(log), self.trials))
                return loss

            ALGORITHMS[self.algorithm](objective, space, self.trials, np.random.default_rng(context.seed))
        return log, profiles

    def _chosen(self, order: list[int]) -> list[int]:
        """The best trials, and as many spread evenly over the ranking of the rest."""
        top = order[: -(-self.finalists // 2)]
        rest = order[len(top) :]
        count = min(self.finalists - len(top), len(rest))
        return top + [rest[round(i)] for i in np.linspace(0, len(rest) - 1, count)]


def _agreement(finalists: Sequence[Mapping[str, float | int | None]]) -> float | None:
    """Spearman's correlation of the two rankings; None where one of them ranks nothing."""
    pairs = [(_or_infinite(f["screened"]), _or_infinite(f["full"])) for f in finalists]
    screened, full = zip(*pairs, strict=True)
    if len(set(screened)) < 2 or len(set(full)) < 2 or len(pairs) < 3:
        return None
    return float(spearmanr(screened, full).statistic)


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def rule_profiles(
    rules: Mapping[str, Allocator], layers: LayerTable, sparsity: float, context: Context
) -> list[dict[str, float]]:
    """What each rule would do, as sparsity by layer name."""
    return [allocate(rule, layers, sparsity, context).sparsities() for rule in rules.values()]
