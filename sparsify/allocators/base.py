"""What an allocator is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from sparsify.allocators.profile import Profile, by_block
from sparsify.errors import NumericsError
from sparsify.types import LayerTable, Pattern, SparsityPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparsify.allocators.context import Context


class Allocator(ABC):
    """Splits a budget of zeros over the layers: a frozen dataclass with a `profile`.

    Attributes:
        version: raised whenever a change moves its numbers; part of a run's identity.
    """

    version: int

    @abstractmethod
    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        """How sparse the rule wants every layer to be; `allocate` makes it meet the budget.

        Args:
            layers: the prunable matrices.
            sparsity: zeros over all of them, above 0 and below 1.
            context: the dense model.

        Raises:
            UsageError: an impossible request, with the legal range in the message.
        """


def allocate(
    allocator: Allocator, layers: LayerTable, sparsity: float, context: Context, pattern: Pattern | None = None
) -> SparsityPlan:
    """The allocator's plan: its profile fitted to the budget and rounded to the pattern.

    A dense model needs no allocation: at sparsity 0 nobody is asked.
    """
    if sparsity == 0:
        return Profile(dict.fromkeys((layer.name for layer in layers), 0.0)).fitted(layers, 0.0, pattern)
    return allocator.profile(layers, sparsity, context).fitted(layers, sparsity, pattern)


def outlier_mapping(signal: list[float], width: float, sparsity: float) -> list[float]:
    """Sparsities falling linearly with the signal over a range `width`, unweighted mean `sparsity`.

    The mapping of OWL's released code (`prune_wanda_outlier`), which DSA and DLP share: keep ratios are min-max
    scaled to `width`, then shifted to mean 1 - `sparsity`. A constant signal gives the uniform allocation.
    """
    low, high = min(signal), max(signal)
    span = (high - low) or 1.0
    keep = [(value - low) / span * width for value in signal]
    mean = sum(keep) / len(keep)
    return [1.0 - (value - mean + 1.0 - sparsity) for value in keep]


def outlier_profile(
    layers: LayerTable, signal: list[float], width: float, sparsity: float, notes: Mapping[str, Any]
) -> Profile:
    """A profile by `outlier_mapping`; as released, blocks at or below zero get 0.01, but the budget is met again after.

    A larger signal means less pruning.
    """
    values = [s if s > 0 else 0.01 for s in outlier_mapping(signal, width, sparsity)]
    return by_block(layers, values, low=min(0.01, sparsity), notes=notes)


def finite_or_none(context: Context, plan: SparsityPlan) -> float | None:
    """The held-out score, or None for a plan that breaks the model: a trial may fail without ending the search."""
    try:
        score = context.score(plan)
    except NumericsError:
        return None
    return score if math.isfinite(score) else None
