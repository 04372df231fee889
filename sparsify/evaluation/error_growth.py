"""Error growth over depth as an evaluation: the curves of `sparsify.analysis.error_growth` on a choice of windows."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sparsify.analysis import error_growth as analysis
from sparsify.data.windows import Windows
from sparsify.evaluation.base import Subject
from sparsify.types import Evaluation, Measurement


@dataclass(frozen=True)
class ErrorGrowth:
    """Relative error of the residual stream after the last block, with every curve by block.

    Source: ATP (arXiv 2502.14770), Eq. 1 and Fig. 1; what each curve is stands in `analysis.error_growth.Growth`.

    Attributes:
        reads_dense: puts dense weights into the pruned model's blocks, which have to be of their shapes.
        windows: which text.
    """

    reads_dense: ClassVar[bool] = True
    windows: Windows
    version: int = 1

    def check(self, subject: Subject) -> None:
        """The text is there, and the model can read its windows."""
        subject.check(self.windows)

    def evaluate(self, subject: Subject) -> Evaluation:
        """`relative_error`, and under `more` the other curves; values are those of the last block."""
        inputs = subject.inputs(self.windows)
        growth = analysis.error_growth(
            subject.view, subject.dense, inputs, batch_size=subject.batch_size, progress=subject.progress
        )
        others = [name for name in analysis.METRICS if name != "relative"]
        return Evaluation(
            **_measurement("relative_error", growth.relative).to_json(),
            protocol=self.windows.protocol,
            text=inputs.provenance,
            more=tuple(_measurement(name, getattr(growth, name)) for name in others),
        )


def _measurement(metric: str, values: Float[Tensor, "blocks windows"]) -> Measurement:
    """Means over the windows, with their standard errors where there are windows enough to tell."""
    curve = values.mean(1).tolist()
    if values.shape[1] < 2:
        return Measurement(metric=metric, value=curve[-1], curve=curve)
    errors = (values.std(1) / values.shape[1] ** 0.5).tolist()
    return Measurement(metric=metric, value=curve[-1], curve=curve, stderr=errors[-1], curve_stderr=errors)
