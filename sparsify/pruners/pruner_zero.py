"""Pruner-Zero: the squared weight times its gradient's norm, scaled to [0, 1] within the matrix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.model.statistics import LayerStats, Needs
from sparsify.pruners.base import ScorePruner
from sparsify.pruners.gblm import GRADIENT


@dataclass(frozen=True)
class PrunerZero(ScorePruner):
    """W_ij^2 * (G_ij - min G) / (max G - min G), min and max over the whole matrix; compared within each output row.

    Source: Dong et al., "Pruner-Zero: Evolving Symbolic Pruning Metric from scratch for Large Language Models"
    (arXiv 2406.02924, ICML 2024): the tree of the release's `data/best_tree.json`, mul(abs(mul(W, W)), mms(G)). G_ij is
    the l2 norm over samples of the loss' gradient, `gblm.GradientNorm`, as the release's scripts have it; neither its
    scale nor whether squares are summed or averaged matters to the score. It is taken of the model as it stands before
    its first block is pruned: the dense one with `method=oneshot`, whatever `method.regime` is.

    Deviations: the release takes G on WikiText-2's training text, in fp16 without scaling the loss, and stores it in
    fp16; here it is of the calibration windows and in fp32, with the loss scaled in fp16. The release stops at a
    gradient that is zero throughout; an expert that no token was routed to is pruned by magnitude here, and where all G
    of a matrix are equal the weights alone are ranked.
    """

    needs: ClassVar[Needs] = frozenset({GRADIENT})

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        return weight.float().square() * min_max_scaled(stats[GRADIENT])


def min_max_scaled(values: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    """The lowest value at 0, the highest at 1; ones where they are the same."""
    low, high = values.aminmax()
    return torch.where(high == low, 1.0, (values - low) / (high - low))
