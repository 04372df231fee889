"""The empirical Fisher information of a model's matrices: its trace, and its diagonal when asked."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import gradient_statistics
from sparsify.model.objective import Objective
from sparsify.model.statistics import Statistic
from sparsify.progress import Progress, silent


@dataclass(frozen=True)
class SquaredGradient(Statistic):
    """Diagonal of the empirical Fisher information, fp32, [out, inp]: mean over windows of (d loss / d w)^2.

    As large as the model in single precision, where it is kept for all layers.
    """

    reads: ClassVar[Literal["input", "pair", "gradient"]] = "gradient"

    def start(self, x: Float[Tensor, "out inp"]) -> Tensor:
        return torch.zeros_like(x)

    def fold(self, state: Any, x: Float[Tensor, "out inp"], seen: Tensor, total: Tensor) -> None:
        state.mul_((seen / total).float()).add_(x.square() * total.float().reciprocal())


@dataclass(frozen=True)
class FisherTrace(Statistic):
    """Sum of that diagonal: squares in single precision, their sum in double (in single where there is no other)."""

    reads: ClassVar[Literal["input", "pair", "gradient"]] = "gradient"

    def start(self, x: Float[Tensor, "out inp"]) -> Tensor:
        return torch.zeros((), device=x.device, dtype=torch.float32 if x.is_mps else torch.float64)

    def fold(self, state: Any, x: Float[Tensor, "out inp"], seen: Tensor, total: Tensor) -> None:
        state.mul_(seen / total).add_(x.square().sum(dtype=state.dtype) / total)


DIAGONAL, TRACE = SquaredGradient(), FisherTrace()


def fisher_traces(
    view: BlockView, inputs: Inputs, objective: Objective, progress: Progress = silent
) -> dict[str, float]:
    """Trace of the empirical Fisher information of the model as it stands, by layer name.

    Tr_l = sum over the weights w of layer l of the mean over windows of (d loss / d w)^2, where a window's loss is the
    mean over its predicted tokens, in nats. MSP (arXiv 2503.11164) measures the sensitivity of a block by it; that
    labels are the text's own (empirical Fisher) and that a sample is a window are ours, the paper's text being unknown
    to us. Squares are taken of one window's gradient, so the batch size is of no matter. One backward pass a window; a
    matrix's gradient is reduced and dropped as it appears, and a large model keeps its blocks' inputs alone
    (`model.gradients`): weights, and a matrix's gradient, not a model's.

    Args:
        view: the model; its flags, gradients and blocks are what they were when this returns or raises.
        inputs: windows.
        objective: the loss.
        progress: told after each window.

    Raises:
        NumericsError: a gradient is not finite; the message names its layer.
    """
    stats = gradient_statistics(view, inputs, frozenset({TRACE}), objective, progress)
    return {name: float(found[TRACE]) for name, found in stats.items()}
