"""Wanda: weight magnitude times the norm of the input it multiplies."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sparsify.model.statistics import NORM, LayerStats, Needs
from sparsify.pruners.base import ScorePruner


@dataclass(frozen=True)
class Wanda(ScorePruner):
    """|W_ij| * ||X_j||_2, compared within each output row.

    Source: Sun et al., arXiv 2306.11695, Eq. 1.
    """

    needs: ClassVar[Needs] = frozenset({NORM})

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        return wanda_scores(weight, stats.norm)


def wanda_scores(weight: Float[Tensor, "out inp"], norm: Float[Tensor, " inp"]) -> Float[Tensor, "out inp"]:
    """|W| scaled by the input norms, fp32."""
    return weight.float().abs() * norm
