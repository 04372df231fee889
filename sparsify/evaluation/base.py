"""What an evaluator is."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from sparsify.data import TokenWindows, Windows

Cut = Callable[[Windows], TokenWindows]
"""Gives the tokens of a window spec for the model at hand."""


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model that was pruned in place.

    Attributes:
        version: raised whenever a change moves its numbers; part of the evaluation's key.
    """

    @property
    def version(self) -> int: ...

    def evaluate(self, model: nn.Module, cut: Cut, batch_size: int | None = None) -> dict[str, Any]:
        """A JSON-ready result with at least `metric`, `value` and `protocol`."""
