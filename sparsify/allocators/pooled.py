"""One threshold for the whole model: each layer gets the share of its own scores that lie below it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.allocators.base import Allocator
from sparsify.allocators.context import Context
from sparsify.allocators.profile import Profile
from sparsify.allocators.scores import wanda_by_layer
from sparsify.errors import UsageError
from sparsify.types import LayerTable

Scores = Iterable[tuple[str, Tensor]]
"""Layer names with their scores, non-negative fp32, made one layer at a time."""


@dataclass(frozen=True)
class Global(Allocator):
    """The lowest scores of all layers together go; a layer's sparsity is its share of them.

    Source: ATP (arXiv 2502.14770), Table 14, which compares with it; the rule is that of Frankle and Carbin (arXiv
    1803.03635) with the score of the pruner.

    Deviations: only the layers' sparsities are taken from the threshold; the pruner then chooses inside its own
    comparison groups. A layer may lose everything: at high sparsity the rule asks for that, and nothing is clipped.

    Attributes:
        score: `wanda` (|W| ||X||, on the dense model's inputs) or `magnitude` (|W|).
    """

    score: Literal["wanda", "magnitude"] = "wanda"
    version: int = 1

    def __post_init__(self) -> None:
        if self.score not in ("wanda", "magnitude"):
            raise UsageError("Unknown score", got=self.score, allowed="wanda, magnitude")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        values = context.once(
            ("global", self.score, sparsity),
            lambda: shares_below(layers, lambda: self._scores(layers, context), sparsity),
        )
        return Profile(values, high=1.0)

    def _scores(self, layers: LayerTable, context: Context) -> Scores:
        if self.score == "wanda":
            return ((layer.name, scores) for layer, scores in wanda_by_layer(layers, context))
        return ((name, weight.float().abs()) for name, weight in context.weights().items())


@dataclass(frozen=True)
class LAMP(Allocator):
    """One threshold over magnitudes that are scaled by what is left of their layer.

    Source: Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning" (arXiv 2010.07611), Eq. 5:
    LAMP(u) = W_u^2 / sum of W_v^2 over the weights v of the layer that are not smaller than u. The largest weight of a
    layer scores 1, so no layer is emptied. A baseline of ATP's Table 14.

    Deviation: only the layers' sparsities are taken from the threshold; the pruner chooses the weights.
    """

    version: int = 1

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        def scores() -> Scores:
            return ((name, lamp_scores(weight)) for name, weight in context.weights().items())

        values = context.once(("lamp", sparsity), lambda: shares_below(layers, scores, sparsity))
        return Profile(values, high=1.0)


def lamp_scores(weight: Float[Tensor, "out inp"]) -> Float[Tensor, " n"]:
    """LAMP scores of a matrix in ascending order of magnitude (their place does not matter for a threshold)."""
    squares = weight.float().abs().flatten().sort().values.double().square()
    left = squares.flip(0).cumsum(0).flip(0)
    # A matrix of zeros has nothing left; its scores are zero like its weights.
    return torch.where(left > 0, squares / left, left).float()


def shares_below(layers: LayerTable, scores: Callable[[], Scores], sparsity: float) -> dict[str, float]:
    """Share of each layer's scores among the `sparsity` share of lowest scores of all layers.

    Two passes of a radix selection: non-negative fp32 numbers are ordered like their bits, so counting the upper and
    then the lower half of the bits finds the threshold exactly, with one layer's scores in memory at a time. Scores
    that equal the threshold are shared out in proportion.
    """
    rank = round(sparsity * layers.numel)
    upper = {name: torch.bincount(_bits(s) >> 16, minlength=1 << 15).cpu() for name, s in scores()}
    edge, before = _bin_of(upper, rank)
    lower = {name: _count_low_bits(_bits(s), edge) for name, s in scores()}
    within, under = _bin_of(lower, rank - before)
    ties = sum(int(counts[within]) for counts in lower.values())
    part = (rank - before - under) / max(ties, 1)

    def below(name: str) -> float:
        return int(upper[name][:edge].sum() + lower[name][:within].sum()) + part * int(lower[name][within])

    return {layer.name: below(layer.name) / layer.numel for layer in layers}


def _bits(scores: Tensor) -> Tensor:
    return scores.flatten().contiguous().view(torch.int32)


def _count_low_bits(bits: Tensor, edge: int) -> Tensor:
    return torch.bincount(bits[bits >> 16 == edge] & 0xFFFF, minlength=1 << 16).cpu()


def _bin_of(counts: dict[str, Tensor], rank: int) -> tuple[int, int]:
    """The first bin up to which there are at least `rank` scores in all layers, and how many lie before it."""
    total = torch.stack(list(counts.values())).sum(dim=0)
    cumulated = total.cumsum(0)
    place = int(torch.searchsorted(cumulated, torch.tensor(rank)))
    return place, int(cumulated[place] - total[place])
