"""What an allocator may ask about the dense model, answered lazily and remembered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sparsify.blocks import BlockView
from sparsify.errors import UsageError
from sparsify.stats import LayerStats
from sparsify.stream import Walk
from sparsify.types import SparsityPlan

Objective = Callable[[SparsityPlan], float]


@dataclass
class DenseContext:
    """Answers for one model and one calibration text; the model must still be dense when asked.

    Attributes:
        view: the dense model.
        tokens: calibration token ids, [n, seqlen].
        batch_size: windows per forward.
        try_plan: held-out perplexity after pruning by a plan, leaving the model dense again.
        memo: answers so far; pass the same dict again for the same model and text.
    """

    view: BlockView
    tokens: Int[Tensor, "n seq"]
    batch_size: int | None = None
    try_plan: Objective | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def weights(self) -> Mapping[str, Tensor]:
        return {layer.spec.name: layer.weight for layer in self.view.layers}

    def dense_stats(self, needs: frozenset[str]) -> Mapping[str, LayerStats]:
        """One pass over the calibration text through the dense model."""
        return self.once(("dense_stats", needs), lambda: self._collect(needs))  # type: ignore[no-any-return]

    def objective(self, plan: SparsityPlan) -> float:
        """Held-out perplexity of a plan.

        Raises:
            UsageError: there is no held-out text.
        """
        if self.try_plan is None:
            raise UsageError("This allocator searches on held-out text", fix="pass heldout=<tokens> to sparsify.prune")
        return self.try_plan(plan)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _collect(self, needs: frozenset[str]) -> dict[str, LayerStats]:
        walk = Walk(self.view, self.tokens, self.batch_size)
        stats: dict[str, LayerStats] = {}
        for block in range(len(self.view.blocks)):
            stats.update(walk.observe(block, needs, advance=True))
        return stats
