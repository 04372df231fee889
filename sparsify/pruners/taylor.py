"""Group Taylor importance (LLM-Pruner): what the loss would lose, to first order, with a head or a channel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.model.blocks import BlockView
from sparsify.model.coupled import Coupled
from sparsify.model.gradients import fold_gradients
from sparsify.model.objective import Objective
from sparsify.model.prunable import Layer
from sparsify.progress import Progress, silent

Order = Literal["element", "vector"]
Reduction = Literal["sum", "mean", "max"]
ORDERS, REDUCTIONS = ("element", "vector"), ("sum", "mean", "max")


@dataclass
class Salience:
    """Importance of the rows (or columns) of one matrix while its gradient is summed up.

    By `vector` what is kept is a sum per row. By `element` it is the gradient itself, until the last sample is in; of a
    single batch no more than one matrix's gradient is there at a time.

    Attributes:
        weight: the matrix, [out, inp].
        along: axis that is summed over: 1 for rows, 0 for columns.
        order: of absolute value and sum.
        samples: how many there will be.
        values: importance by row or column, in fp32, once all samples are in.
    """

    weight: Float[Tensor, "out inp"]
    along: int
    order: Order
    samples: int
    values: Float[Tensor, " units"] | None = None
    _seen: int = field(default=0, init=False)
    _sum: Tensor | None = field(default=None, init=False)

    def fold(self, gradient: Float[Tensor, "out inp"], samples: int) -> None:
        """Take in the gradient of the mean loss of some samples."""
        share = gradient * (samples / self.samples)
        part = (share * self.weight).sum(self.along) if self.order == "vector" else share
        self._sum = part if self._sum is None else self._sum.add_(part)
        self._seen += samples
        if self._seen == self.samples:
            whole = self._sum if self.order == "vector" else (self._sum * self.weight).abs_().sum(self.along)
            self.values, self._sum = whole.abs().float(), None


def importances(
    view: BlockView,
    groups: list[Coupled],
    inputs: Inputs,
    objective: Objective,
    *,
    order: Order = "element",
    reduction: Reduction = "sum",
    batch_size: int = 1,
    progress: Progress = silent,
) -> list[Float[Tensor, " units"]]:
    """Importance of every unit of every group, in fp32 on the device of its matrices.

    With G the gradient of the mean loss over all inputs by a matrix W, a row (or column) of it has the importance
    sum_j |W_ij G_ij| by `element` and |sum_j W_ij G_ij| by `vector`; a unit that of its rows, summed, in each matrix;
    and in the group the sum, mean or maximum of these over the matrices.

    Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models" (arXiv 2305.11627), Eqs. 3 to 5
    and the aggregations below them; `element` is `param_first` of the release, `vector` its `vectorize`.

    Deviations: the maximum is over matrices of a whole head; in the release it is taken for every channel of a head
    before they are summed, which grouped queries leave without a meaning. Products and the last option are left out.

    Args:
        view: the dense model.
        groups: its heads and channels.
        inputs: the calibration text.
        objective: the loss.
        order: of absolute value and sum.
        reduction: over the matrices of a group.
        batch_size: samples in a backward pass; moves nothing but rounding.
        progress: told after each batch.

    Raises:
        NumericsError: a gradient is not finite; the message names its layer.
    """
    columns = {name for group in groups for name in group.columns}

    def start(layer: Layer) -> Salience:
        return Salience(layer.weight, 0 if layer.spec.name in columns else 1, order, len(inputs))

    found = fold_gradients(view, inputs, start, objective, batch_size=batch_size, progress=progress)
    values = {name: _reached(salience) for name, salience in found.items()}
    return [reduced(group, values, reduction) for group in groups]


def reduced(
    group: Coupled, values: Mapping[str, Float[Tensor, "..."]], reduction: Reduction
) -> Float[Tensor, " units"]:
    """The importance of units from those of rows and columns, by matrix."""
    by_matrix = [values[name].view(group.count, group.widths[name]).sum(1) for name in group.linears]
    stacked = torch.stack([part.to(by_matrix[0].device) for part in by_matrix])
    return stacked.amax(0) if reduction == "max" else stacked.mean(0) if reduction == "mean" else stacked.sum(0)


def _reached(salience: Salience) -> Float[Tensor, " units"]:
    """Zeros for a matrix that the loss does not depend on."""
    if salience.values is not None:
        return salience.values
    return torch.zeros(salience.weight.shape[1 - salience.along], device=salience.weight.device)


def most_important(values: Float[Tensor, " units"], count: int) -> list[int]:
    """Indices of the units that stay, ascending; of equals the later ones."""
    kept: list[int] = torch.argsort(values, stable=True)[len(values) - count :].sort().values.tolist()
    return kept
