"""GBLM: Wanda's score with the norm of the gradient added to that of the input."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.errors import UsageError
from sparsify.model.statistics import NORM, LayerStats, Needs, Statistic
from sparsify.pruners.base import ScorePruner


@dataclass(frozen=True)
class GradientNorm(Statistic):
    """||G_ij||_2 over samples, fp32, [out, inp]: root of the sum over samples of (d loss / d W_ij)^2.

    A sample's loss is the mean over its predictions, and every sample has a gradient of its own. As large as the model
    in single precision, where it is kept for all layers.
    """

    reads: ClassVar[Literal["input", "pair", "gradient"]] = "gradient"

    def start(self, x: Float[Tensor, "out inp"]) -> Tensor:
        return torch.zeros_like(x)

    def fold(self, state: Any, x: Float[Tensor, "out inp"], seen: Tensor, total: Tensor) -> None:
        state.addcmul_(x, x)

    def finalise(self, state: Any) -> Tensor:
        root: Tensor = state.sqrt()
        return root


GRADIENT = GradientNorm()


@dataclass(frozen=True)
class GBLM(ScorePruner):
    """|W_ij| * (||X_j||_2 + alpha * ||G_ij||_2), compared within each output row.

    Source: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models"
    (arXiv 2311.04902), GBLM-Pruner. X enters the layer after pruned blocks (`method.regime`), G is the gradient of the
    model as it stands before its first block is pruned: the dense one's with `method=oneshot`. As released, the squares
    of X are averaged over samples and those of G summed, so alpha weighs more the more samples there are; the release's
    100 goes with 128.

    Deviations: the release also saves a sum of |G|, the paper's l1 norm, which is not offered here. It runs the
    backward pass in fp16 without scaling the loss, stores the norm in fp16, and takes |W| times it in fp16; here the
    loss is scaled in fp16 and all that follows is in fp32. X and G are of the same calibration windows.

    Attributes:
        alpha: weight of the gradient's norm; the release multiplies gradients by it (`--scale`).
    """

    needs: ClassVar[Needs] = frozenset({NORM, GRADIENT})
    alpha: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < math.inf:
            raise UsageError(
                "alpha weighs the norm of the gradient", got=self.alpha, allowed="alpha >= 0", fix="pruner.alpha=100.0"
            )

    def score(self, weight: Float[Tensor, "out inp"], stats: LayerStats) -> Float[Tensor, "out inp"]:
        return weight.float().abs() * (stats.norm + self.alpha * stats[GRADIENT])
