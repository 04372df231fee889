"""RIA: relative importance of a weight within its row and column, times a power of the input norm."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from sparsify.errors import UsageError
from sparsify.model.statistics import NORM, LayerStats, Needs
from sparsify.pruners.base import Pruned, ScorePruner
from sparsify.pruners.masks import Group, keep_n_of_m
from sparsify.pruners.permutation import assigned, dealt
from sparsify.types import Target


@dataclass(frozen=True)
class RIA(ScorePruner):
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a, compared over the whole matrix.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models"
    (ICLR 2024), Eq. 3-4; channel permutation for N:M, Section 3.3.

    Deviations: the number of zeros is exact, and the sums over rows and columns are in fp32. `permute` is off by
    default: a permuted matrix is N:M only once its inputs are reordered, which whatever runs it has to do. The weights
    themselves stay in their order; every matrix has an order of its own.

    Attributes:
        a: exponent of the input norm.
        group: `matrix` as released; `row` is the release's `--per_outneuron`.
        permute: for N:M, which inputs form a group of M: `none`, neighbours; `deal`, inputs dealt out by their summed
            scores; `assign`, that and the release's refinement by linear sum assignment.
    """

    needs: ClassVar[Needs] = frozenset({NORM})
    group: Group = "matrix"
    a: float = 0.5
    permute: Literal["none", "deal", "assign"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.a <= 10:
            raise UsageError(
                "a is the exponent of the input norm", got=self.a, allowed="0 <= a <= 10", fix="pruner.a=0.5"
            )
        if self.permute not in ("none", "deal", "assign"):
            raise UsageError("Unknown permutation", got=self.permute, allowed="none, deal, assign")

    @property
    def by_neighbours(self) -> bool:
        return self.permute == "none"

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        size = weight.float().abs()
        relative = size / size.sum(dim=0).clamp_min(1e-30) + size / size.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return relative * stats.norm**self.a

    def prune(self, weight: Float[Tensor, "out inp"], stats: LayerStats, target: Target) -> Pruned:
        """Zero the lowest scores of every group, of a group of permuted inputs where that is asked for."""
        if target.group is None or target.kept is None or self.by_neighbours:
            return super().prune(weight, stats, target)
        scores = self.score(weight, stats)
        order = dealt(scores, target.group)
        if self.permute == "assign":
            order = assigned(scores, order, target.kept, target.group)
        keep = keep_n_of_m(scores[:, order], target.kept, target.group)[:, order.argsort()]
        return Pruned(weight * keep, keep)
