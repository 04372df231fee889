"""Magnitude pruning: the smallest weights go."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sparsify.model.statistics import LayerStats, Needs
from sparsify.pruners.base import ScorePruner
from sparsify.pruners.masks import Group


@dataclass(frozen=True)
class Magnitude(ScorePruner):
    """|W_ij|, compared over the whole matrix.

    Source: the baseline of Sun et al., "A Simple and Effective Pruning Approach for Large Language Models"
    (arXiv 2306.11695). The released code zeroes all ties with the threshold; here the count is exact.
    """

    needs: ClassVar[Needs] = frozenset()
    group: Group = "matrix"

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        return weight.float().abs()
