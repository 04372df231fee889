"""What an allocator is, and what it may ask about the dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sparsify.types import LayerTable, SparsityPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from sparsify.stats import LayerStats


@runtime_checkable
class Context(Protocol):
    """The dense model, asked lazily: nothing is computed that the allocator does not read."""

    def weights(self) -> Mapping[str, Tensor]:
        """Dense weights by layer name, each [out, inp]."""

    def dense_stats(self, needs: frozenset[str]) -> Mapping[str, LayerStats]:
        """Input statistics of the unpruned model by layer name."""

    def objective(self, plan: SparsityPlan) -> float:
        """Perplexity on held-out calibration text after pruning by `plan`; the weights are put back."""

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed once per dense model and remembered across cells."""


@runtime_checkable
class Allocator(Protocol):
    """Splits a budget of zeros over the layers.

    Attributes:
        version: raised whenever a change moves its numbers; part of a run's identity.
    """

    @property
    def version(self) -> int: ...

    def check(self, wanted: float, num_blocks: int) -> None:
        """Refuse an impossible request before any model is loaded.

        Raises:
            UsageError: with the legal range in the message.
        """

    def allocate(self, layers: LayerTable, wanted: float, context: Context) -> SparsityPlan:
        """A plan whose parameter-weighted mean sparsity is `wanted`."""


def outlier_mapping(signal: list[float], width: float, wanted: float) -> list[float]:
    """Sparsities falling linearly with the signal over a range `width`, unweighted mean `wanted`.

    The mapping of OWL's released code (`prune_wanda_outlier`), which DSA and DLP share: keep ratios are min-max
    scaled to `width`, then shifted to mean 1 - `wanted`. A constant signal gives the uniform allocation.
    """
    low, high = min(signal), max(signal)
    span = (high - low) or 1.0
    keep = [(value - low) / span * width for value in signal]
    mean = sum(keep) / len(keep)
    return [1.0 - (value - mean + 1.0 - wanted) for value in keep]
