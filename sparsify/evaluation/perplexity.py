"""Perplexity as the pruning papers compute it, as an evaluation."""

from dataclasses import dataclass

from sparsify.data.windows import Windows
from sparsify.evaluation.base import Subject
from sparsify.model.objective import perplexity
from sparsify.types import Evaluation


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on one choice of windows, with the protocol tag that numbers must share to be compared.

    Attributes:
        windows: which text.
    """

    windows: Windows
    version: int = 1

    def check(self, subject: Subject) -> None:
        """The text is there, and the model can read its windows."""
        subject.check(self.windows)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`model.objective.perplexity` with the provenance of the text."""
        inputs = subject.inputs(self.windows)
        value = perplexity(subject.model, inputs, batch_size=subject.batch_size)
        return Evaluation(metric="perplexity", value=value, protocol=self.windows.protocol, text=inputs.provenance)
