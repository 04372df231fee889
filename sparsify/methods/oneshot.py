"""One-shot pruning: allocate, then prune."""

from dataclasses import dataclass

from sparsify.methods.base import Method, MethodResult
from sparsify.methods.job import Job
from sparsify.methods.observing import Regime, check_regime
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks


@dataclass(frozen=True)
class OneShot(Method):
    """A plan for the budget, and one walk that prunes by it.

    Attributes:
        regime: where a layer's statistics come from: `propagated` (the papers), `sequential` or `dense`; what they
            mean stands in `methods.observing.observed`.
    """

    regime: Regime = "propagated"
    version: int = 1

    def __post_init__(self) -> None:
        check_regime(self.regime)

    def apply(self, view: BlockView, job: Job) -> MethodResult:
        plan, masks = job.plan(job.sparsity, regime=self.regime), Masks()
        return MethodResult(plan, job.prune(plan, regime=self.regime, masks=masks), masks)
