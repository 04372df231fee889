"""Erdos-Renyi: wide matrices are pruned more, whatever they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsify.allocators.base import Allocator
from sparsify.allocators.profile import Profile
from sparsify.errors import BudgetError
from sparsify.types import LayerSpec, LayerTable

if TYPE_CHECKING:
    from sparsify.allocators.context import Context


@dataclass(frozen=True)
class ErdosRenyi(Allocator):
    """Density eps (n_in + n_out) / (n_in n_out), with one eps for all layers that meets the budget.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (arXiv
    1707.04780), Eq. 3, as Evci et al. (arXiv 1911.11134, Section 3) use it: a layer whose density would exceed one
    stays dense and eps is solved again. A baseline of ATP's Table 14. Blocks of equal shapes get equal sparsities.
    """

    version: int = 1

    dense_last: ClassVar[bool] = False

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        dense = {layers.layers[-1].name} if self.dense_last else set()
        densities = er_densities(layers, sparsity, dense)
        return Profile({name: 1 - value for name, value in densities.items()}, high=1.0)


@dataclass(frozen=True)
class ErdosRenyiPlus(ErdosRenyi):
    """Erdos-Renyi with the last layer kept dense, at the same budget.

    Source: Liu et al., "The Unreasonable Effectiveness of Random Pruning" (arXiv 2202.02643), Section 3.1 (ERK+), for
    matrices. A baseline of ATP's Table 14.

    Deviation: their last layer is the classifier, which is never pruned here; the last prunable matrix takes its place.
    """

    dense_last: ClassVar[bool] = True


def er_densities(layers: LayerTable, sparsity: float, dense: set[str]) -> dict[str, float]:
    """Density of every layer; those in `dense` and those that would exceed one are held at one.

    Raises:
        BudgetError: the layers held dense are more than may be kept.
    """
    held = set(dense)
    while True:
        free = [x for x in layers if x.name not in held]
        left = (1 - sparsity) * layers.numel - sum(x.numel for x in layers if x.name in held)
        if left < 0:
            most = sum(x.numel for x in free) / layers.numel
            raise BudgetError(
                f"More stays dense than this sparsity keeps: {', '.join(sorted(held))}",
                got=f"sparsity={sparsity:g}",
                allowed=f"sparsity <= {most:.4g}",
                fix="allocator=er, or a lower sparsity",
            )
        eps = left / sum(x.in_features + x.out_features for x in free) if free else 0.0
        over = {x.name for x in free if _density(x, eps) > 1}
        if not over:
            return {x.name: 1.0 if x.name in held else _density(x, eps) for x in layers}
        held |= over


def _density(layer: LayerSpec, eps: float) -> float:
    return eps * (layer.in_features + layer.out_features) / layer.numel
