"""What an allocator is, and what it may ask about the dense model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sparsify.allocators.budget import fit_plan
from sparsify.errors import NumericsError
from sparsify.types import LayerTable, SparsityPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from sparsify.analysis.drift import Drift
    from sparsify.analysis.perturbation import Source
    from sparsify.model.statistics import LayerStats
    from sparsify.search.screen import Screen


@runtime_checkable
class Context(Protocol):
    """The dense model, asked lazily: nothing is computed that the allocator does not read."""

    def weights(self) -> Mapping[str, Tensor]:
        """Dense weights by layer name, each [out, inp]."""

    def dense_stats(self, needs: frozenset[str]) -> Mapping[str, LayerStats]:
        """Input statistics of the unpruned model by layer name."""

    def dense_blocks(self, needs: frozenset[str]) -> Iterator[Mapping[str, LayerStats]]:
        """The same, block by block and not remembered: for statistics too large to keep for a whole model."""

    def hidden_states(self, windows: int) -> Iterator[Tensor]:
        """What enters each block of the unpruned model, [windows, seq, dim], for the first calibration windows."""

    def input_norms(self, plan: SparsityPlan, windows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """||X_j|| of every layer's input before and after its block is pruned by `plan`, all earlier blocks pruned."""

    def objective(self, plan: SparsityPlan) -> float:
        """Perplexity on held-out calibration text after pruning by `plan`; the weights are put back."""

    def heldout_tokens(self, windows: int | None) -> Tensor:
        """Token ids of the first held-out windows (all for None), [m, seqlen]; an error if there is no such text."""

    def drift(self, source: Source, windows: int | None, seeds: int) -> Drift:
        """What becomes of a disturbance of each block of the dense model, on the first calibration windows."""

    def screen(self, windows: int | None) -> AbstractContextManager[Screen]:
        """A screen of the model on the first calibration windows; the weights are put back when it closes."""

    @property
    def seed(self) -> int:
        """For searches that draw."""

    @property
    def progress(self) -> Callable[[int, int], None]:
        """To be told (trials done, trials in all)."""

    def once(self, key: Any, make: Callable[[], Any], *, of_weights: bool = False) -> Any:
        """`make()`, computed once per dense model and text (or per model, where it is `of_weights` alone)."""


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


def outlier_plan(
    layers: LayerTable, signal: list[float], width: float, wanted: float, notes: Mapping[str, Any]
) -> SparsityPlan:
    """A plan by `outlier_mapping`; as released, blocks at or below zero get 0.01, but the budget is met again after.

    A larger signal means less pruning.
    """
    by_block = [s if s > 0 else 0.01 for s in outlier_mapping(signal, width, wanted)]
    plan = fit_plan(layers, layers.spread(by_block), wanted, low=min(0.01, wanted))
    return SparsityPlan(plan.targets, plan.ledger, notes=notes)


def finite_or_none(context: Context, plan: SparsityPlan) -> float | None:
    """The objective, or None for a plan that breaks the model: a trial may fail without ending the search."""
    try:
        score = context.objective(plan)
    except NumericsError:
        return None
    return score if math.isfinite(score) else None
