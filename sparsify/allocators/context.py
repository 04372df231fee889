"""What an allocator may ask: the dense model, its statistics, and how good a plan is. Answered lazily, remembered."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sparsify.data.inputs import Inputs, first
from sparsify.errors import UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.objective import NextToken, Objective
from sparsify.model.statistics import LayerStats, Needs
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent
from sparsify.pruners.base import Pruner
from sparsify.search.levels import Place, level_proxy
from sparsify.search.proxy import Proxy
from sparsify.search.ranks import RankProxy, rank_proxy
from sparsify.search.repaired import RepairedProxy
from sparsify.types import Pattern, SparsityPlan, Target


@runtime_checkable
class Keeper(Protocol):
    """Keeps the state of a long search where a killed run finds it again (`methods.checkpoint.Checkpoint`)."""

    def load(self) -> Any | None: ...
    def save(self, state: Any) -> None: ...


@dataclass
class Context:
    """One dense model with inputs to calibrate on; the model must be dense whenever something is asked.

    Attributes:
        view: the model.
        calibration: what statistics are taken on.
        heldout: what searches score on; None where there is nothing.
        batch_size: samples per forward.
        objective: the loss that searches lower.
        try_plan: held-out score after pruning by a plan, leaving the model dense again.
        snapshot: makes or finds the copy of the dense model.
        memo: answers so far; pass the same dict again for the same model, whatever the inputs.
        pruner: of the run, for allocators that prune on trial.
        pattern: of the run, which trial plans are rounded to.
        seed: of searches that draw.
        progress: told of trials and blocks.
        checkpoint: of a search's own; None where nothing is kept.
    """

    view: BlockView
    calibration: Inputs
    heldout: Inputs | None = None
    batch_size: int | None = None
    objective: Objective = field(default_factory=NextToken)
    try_plan: Callable[[SparsityPlan], float] | None = None
    snapshot: Callable[[], DenseModel] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    pruner: Pruner | None = None
    pattern: Pattern = field(default_factory=Pattern)
    seed: int = 0
    progress: Progress = silent
    checkpoint: Keeper | None = None

    def weights(self) -> Mapping[str, Tensor]:
        """Dense weights by layer name, each [out, inp], where the model is."""
        return {layer.spec.name: layer.weight for layer in self.view.layers}

    def stats(self, needs: Needs) -> Mapping[str, LayerStats]:
        """Input statistics of the dense model by layer name."""
        return self.once(("stats", needs), lambda: self._all_stats(needs))  # type: ignore[no-any-return]

    def stats_by_block(self, needs: Needs) -> Iterator[Mapping[str, LayerStats]]:
        """The same, block by block and not remembered: for statistics too large to keep for a whole model."""
        walk = self.walk(needs=needs)
        for block in range(len(self.view.blocks)):
            yield walk.observe(block, needs, advance=True)

    def walk(self, samples: int | None = None, needs: Needs = frozenset()) -> Walk:
        """The first calibration inputs before the first block, all for None; `needs` where some are of pairs."""
        return Walk(self.view, first(self.calibration, samples), self.batch_size, needs=needs)

    def heldout_inputs(self, samples: int | None = None) -> Inputs:
        """The first held-out inputs, or all of them.

        Raises:
            UsageError: there are none.
        """
        if self.heldout is None:
            raise UsageError("This allocator searches on held-out text", fix="pass heldout=<tokens> to sparsify.prune")
        return first(self.heldout, samples)

    def score(self, plan: SparsityPlan) -> float:
        """Exp of the mean held-out loss (a perplexity, for text) after pruning by a plan; the model is dense again.

        Raises:
            UsageError: there is nothing held out.
            NumericsError: it is not finite.
        """
        self.heldout_inputs()
        assert self.try_plan is not None
        return self.try_plan(plan)

    def proxy(self, samples: int | None, pattern: Pattern | None = None) -> AbstractContextManager[RankProxy]:
        """Wanda masks by rank, on the first calibration inputs; the model is dense again when it closes.

        With a pattern of N:M ranks are those within groups of M, by the run's own scores if its pruner only ranks.
        """
        group = pattern.group if pattern is not None else None
        inputs = first(self.calibration, samples)
        return rank_proxy(self.view, self._dense(), inputs, self.objective, self.pruner, group).closing()

    def repaired_proxy(
        self, samples: int | None, reach: float, pattern: Pattern | None = None
    ) -> AbstractContextManager[RepairedProxy]:
        """The run's own pruner, and what a zero costs once it has repaired the layer; dense again when it closes.

        Args:
            samples: calibration inputs, the first ones; all for None.
            reach: difference in sparsity over which a cost is taken.
            pattern: of N:M, where plans are on it; None for unstructured ones.
        """
        assert self.pruner is not None
        group = pattern.group if pattern is not None else None
        inputs = first(self.calibration, samples)
        proxy = RepairedProxy(
            self.view, self._dense(), inputs, self.objective, pruner=self.pruner, group=group, reach=reach
        )
        return proxy.closing()

    @contextmanager
    def dense_proxy(self, samples: int | None) -> Iterator[RankProxy]:
        """The same with its ranks taken in the dense model."""
        with self.proxy(samples) as proxy:
            proxy.settle({layer.name: Target(0.0) for layer in self.view.table})
            yield proxy

    def level_proxy(
        self, samples: int | None, levels: Sequence[int], place: Place = "memory"
    ) -> AbstractContextManager[Proxy]:
        """The run's pruner at levels of the run's N:M pattern; the model is dense again when it closes.

        Args:
            samples: calibration inputs, the first ones; all for None.
            levels: kept counts that plans may ask for.
            place: of weights that have to be stored.

        Raises:
            UsageError: there is no pruner or no group of M, or what must be stored does not fit.
        """
        group = self.pattern.group
        if self.pruner is None or group is None:
            raise UsageError(
                "Levels are those of a pruner and of N:M", got=f"pattern={self.pattern}", allowed="mixed:M"
            )
        inputs = first(self.calibration, samples)
        return level_proxy(self.view, self._dense(), inputs, self.objective, self.pruner, group, levels, place)

    def _dense(self) -> DenseModel:
        return self.snapshot() if self.snapshot is not None else self.view.snapshot()

    def once(self, key: Any, make: Callable[[], Any], *, of_weights: bool = False) -> Any:
        """`make()`, computed once per dense model and inputs (or per model, where it is `of_weights` alone)."""
        place = key if of_weights else (self._digest, key)
        if place not in self.memo:
            self.memo[place] = make()
        return self.memo[place]

    @cached_property
    def _digest(self) -> str:
        return self.calibration.digest

    def _all_stats(self, needs: Needs) -> dict[str, LayerStats]:
        return {name: stats for block in self.stats_by_block(needs) for name, stats in block.items()}
