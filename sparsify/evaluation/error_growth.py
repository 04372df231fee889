"""Error growth over depth as an evaluation: the curves of `sparsify.analysis.error_growth` on a choice of windows."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sparsify.analysis import error_growth as analysis
from sparsify.data.windows import Windows
from sparsify.evaluation.base import Subject
from sparsify.model.blocks import BlockView


@dataclass(frozen=True)
class ErrorGrowth:
    """Relative error of the residual stream after the last block, with every curve by block.

    Source: ATP (arXiv 2502.14770), Eq. 1 and Fig. 1; what each curve is stands in `analysis.error_growth.Growth`.

    Attributes:
        windows: which text.
    """

    windows: Windows
    version: int = 1

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """`relative_error`, and under `more` the other curves; values are those of the last block."""
        text = subject.cut(self.windows)
        growth = analysis.error_growth(
            BlockView(subject.model), subject.dense, text.tokens, batch_size=subject.batch_size
        )
        others = [name for name in analysis.METRICS if name != "relative"]
        return {
            **_measurement("relative_error", growth.relative),
            "protocol": self.windows.protocol,
            "text": text.provenance,
            "more": [_measurement(name, getattr(growth, name)) for name in others],
        }


def _measurement(metric: str, values: Float[Tensor, "blocks windows"]) -> dict[str, Any]:
    """Means over the windows, with their standard errors where there are windows enough to tell."""
    curve = values.mean(1).tolist()
    found: dict[str, Any] = {"metric": metric, "value": curve[-1], "curve": curve}
    if values.shape[1] > 1:
        errors = (values.std(1) / values.shape[1] ** 0.5).tolist()
        found |= {"stderr": errors[-1], "curve_stderr": errors}
    return found
