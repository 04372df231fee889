"""What an evaluator is, and what it gets to see."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sparsify.data.inputs import Inputs
from sparsify.data.windows import Windows
from sparsify.model.blocks import BlockView
from sparsify.model.limits import check_readable
from sparsify.progress import Progress, silent
from sparsify.types import Evaluation


@dataclass(frozen=True)
class Subject:
    """A model that was pruned in place, with what is needed to measure it.

    Attributes:
        view: the pruned model, in eval mode.
        tokenizer: its tokenizer; None for random-weight models.
        inputs: those of a spec, made once per process.
        dense: the prunable weights as they were, [out, inp] by layer name.
        batch_size: samples per forward; None picks one for the device.
        progress: told of phases by evaluations that take long.
    """

    view: BlockView
    tokenizer: Any
    inputs: Callable[[Windows], Inputs]
    dense: Mapping[str, Tensor]
    batch_size: int | None = None
    progress: Progress = silent

    @property
    def model(self) -> nn.Module:
        return self.view.model

    def check(self, windows: Windows) -> None:
        """Make the inputs of a spec, which later calls get, and refuse what the model cannot read.

        Raises:
            DataError: the text is nowhere or too short.
            UsageError: windows longer than the model's positions, or token ids without an embedding.
        """
        check_readable(self.model, self.inputs(windows))


@runtime_checkable
class Evaluator(Protocol):
    """Measures a pruned model and leaves it as it was: a frozen dataclass.

    Attributes:
        version: raised whenever a change moves its numbers; part of the evaluation's key.
    """

    @property
    def version(self) -> int: ...

    def check(self, subject: Subject) -> None:
        """Raise before the model is pruned what `evaluate` would raise for want of something: text, rows, a tokenizer.

        What is made for that is kept, not made twice.
        """

    def evaluate(self, subject: Subject) -> Evaluation:
        """A number with its protocol, and what else is worth keeping."""
