"""RIA: relative importance of a weight within its row and column, times a power of the input norm."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sparsify.errors import UsageError
from sparsify.model.statistics import NORM, LayerStats, Needs
from sparsify.pruners.base import ScorePruner
from sparsify.pruners.masks import Group


@dataclass(frozen=True)
class RIA(ScorePruner):
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a, compared over the whole matrix.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models"
    (ICLR 2024), Eq. 3-4. Channel permutation for N:M is not part of this pruner.

    Deviations: the number of zeros is exact, and the sums over rows and columns are in fp32.

    Attributes:
        a: exponent of the input norm.
        group: `matrix` as released; `row` is the release's `--per_outneuron`.
    """

    needs: ClassVar[Needs] = frozenset({NORM})
    group: Group = "matrix"
    a: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.a <= 10:
            raise UsageError(
                "a is the exponent of the input norm", got=self.a, allowed="0 <= a <= 10", fix="pruner.a=0.5"
            )

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        size = weight.float().abs()
        relative = size / size.sum(dim=0).clamp_min(1e-30) + size / size.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return relative * stats.norm**self.a
