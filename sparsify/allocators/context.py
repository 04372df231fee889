"""What an allocator may ask: the dense model, its statistics, and how good a plan is. Answered lazily, remembered."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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
from sparsify.search.proxy import Proxy
from sparsify.types import Pattern, SparsityPlan


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

    def weights(self) -> Mapping[str, Tensor]:
        """Dense weights by layer name, each [out, inp], where the model is."""
        return {layer.spec.name: layer.weight for layer in self.view.layers}

    def stats(self, needs: Needs) -> Mapping[str, LayerStats]:
        """Input statistics of the dense model by layer name."""
        return self.once(("stats", needs), lambda: self._all_stats(needs))  # type: ignore[no-any-return]

    def stats_by_block(self, needs: Needs) -> Iterator[Mapping[str, LayerStats]]:
        """The same, block by block and not remembered: for statistics too large to keep for a whole model."""
        walk = self.walk()
        for block in range(len(self.view.blocks)):
            yield walk.observe(block, needs, advance=True)

    def walk(self, samples: int | None = None) -> Walk:
        """The first calibration inputs before the first block; all for None."""
        return Walk(self.view, first(self.calibration, samples), self.batch_size)

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

    def proxy(self, samples: int | None) -> AbstractContextManager[Proxy]:
        """A cheap stand-in for pruning, on the first calibration inputs; the model is dense again when it closes."""
        dense = self.snapshot() if self.snapshot is not None else self.view.snapshot()
        return Proxy(self.view, dense, first(self.calibration, samples), self.objective).closing()

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
