"""What an evaluator is, and what it gets to see."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sparsify.data.windows import TokenWindows, Windows

Cut = Callable[[Windows], TokenWindows]
"""Gives the tokens of a window spec for the model at hand."""


@dataclass(frozen=True)
class Subject:
    """A model that was pruned in place, with what is needed to measure it.

    Attributes:
        model: the pruned model, in eval mode.
        tokenizer: its tokenizer; None for random-weight models.
        cut: tokens of a window spec, cut once per process.
        dense: the prunable weights as they were, [out, inp] by layer name.
        batch_size: windows per forward; None picks one for the device.
        progress: told (done, total) by evaluations that take long.
    """

    model: nn.Module
    tokenizer: Any
    cut: Cut
    dense: Mapping[str, Tensor]
    batch_size: int | None = None
    progress: Callable[[int, int], None] = lambda done, total: None


@runtime_checkable
class Evaluator(Protocol):
    """Measures a pruned model and leaves it as it was.

    Attributes:
        version: raised whenever a change moves its numbers; part of the evaluation's key.
    """

    @property
    def version(self) -> int: ...

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """A JSON-ready result: `metric`, `value` and `protocol`, and what else is worth keeping.

        `more` may list further measurements, each with a `metric` and a `value` (and a `stderr`, or a `curve` of
        values by block); a report shows them as rows of their own, `<evaluation>.<metric>`.
        """
