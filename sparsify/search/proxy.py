"""Stand-ins for pruning: any plan on a whole model in milliseconds, so that a search can try thousands of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.data.inputs import Inputs, batches
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.gradients import layer_gradients
from sparsify.model.objective import Objective, batch_size_for, mean_loss
from sparsify.model.prunable import Layer
from sparsify.types import LayerSpec, Target


@runtime_checkable
class Proxy(Protocol):
    """A model that takes on any plan at once: by rank (`ranks`), or from stored weights (`levels`)."""

    def closing(self) -> AbstractContextManager[Any]:
        """Leave the model dense, whatever happened inside."""

    def apply(self, targets: Mapping[str, Target]) -> None:
        """Prune by a plan, a target for every layer by name."""

    def loss(self, inputs: Inputs) -> float:
        """Mean loss in nats per prediction of the model as it is pruned now; infinite if not a number."""


@dataclass
class ModelProxy(ABC):
    """A proxy that writes into the model itself, and only what a plan changes.

    Attributes:
        view: the model; dense when this is made, and `closing` makes it so again.
        dense: the model before pruning.
        inputs: for calibration.
        objective: the loss.
        current: what each layer holds now, as `wanted` names it.
    """

    view: BlockView
    dense: DenseModel
    inputs: Inputs
    objective: Objective
    current: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.batch_size = batch_size_for(self.view.device, self.inputs.length)
        self._prepared = self.objective.prepare(self.view.model, self.inputs)
        self._near: dict[str, Tensor] = {}  # dense weights on their devices
        self._keep_near = fits(self.view, sum(x.weight.nbytes for x in self.view.layers))

    @abstractmethod
    def wanted(self, layer: LayerSpec, target: Target) -> int:
        """A number that says what the layer holds under a target."""

    @abstractmethod
    def write(self, layer: Layer, wanted: int) -> None:
        """Put it there."""

    @contextmanager
    def closing(self) -> Iterator[Any]:
        """Leave the model dense, whatever happened."""
        try:
            yield self
        finally:
            self.view.restore(self.dense)
            self.current.clear()
            self._near.clear()

    @torch.no_grad()
    def apply(self, targets: Mapping[str, Target]) -> None:
        """Prune by another plan; layers that stay as they are are not touched."""
        for layer in self.view.layers:
            wanted = self.wanted(layer.spec, targets[layer.spec.name])
            if self.current.get(layer.spec.name) != wanted:
                self.write(layer, wanted)
                self.current[layer.spec.name] = wanted

    def loss(self, inputs: Inputs) -> float:
        """Mean loss in nats per prediction of the model as it is pruned now; infinite if not a number."""
        mean = mean_loss(self.view.model, inputs, self.objective, batch_size=self.batch_size, loss=self._prepared)
        return mean if math.isfinite(mean) else math.inf

    def dense_weight(self, layer: Layer) -> Float[Tensor, "out inp"]:
        """The dense weight on the layer's device: kept there where all of them fit, else for as long as it is used."""
        name, device = layer.spec.name, layer.weight.device
        if name in self._near:
            return self._near[name]
        weight = self.dense[name].to(device, non_blocking=True)
        if self._keep_near:
            self._near[name] = weight
        return weight


class PricedProxy(ModelProxy):
    """A proxy that says what a zero more would cost in each layer."""

    @abstractmethod
    def settle(self, targets: Mapping[str, Target]) -> None:
        """Prune by a plan with statistics of the model that it makes; plans near it are tried from there."""

    @abstractmethod
    def price(self, layer: Layer, gradient: Float[Tensor, "out inp"], band: float) -> Float[Tensor, ""]:
        """What a zero more in a layer adds to the loss, to first order, by the gradient of a part of the text."""

    def marginal_costs(self, inputs: Inputs, band: float) -> dict[str, float]:
        """What pruning one weight more in each layer adds to the loss, to first order, in nats per prediction.

        Args:
            inputs: whose loss counts.
            band: how far from the present sparsity a cost is taken, as a fraction of a row, half of it on either side.

        Raises:
            NumericsError: a gradient is not finite at any loss scale.
        """
        loss = self.objective.prepare(self.view.model, inputs)
        scale = 1024.0
        while scale >= 1.0:  # half-precision gradients underflow unscaled and overflow scaled too much
            costs = dict.fromkeys(self.dense, 0.0)
            for where in batches(inputs, max(1, self.batch_size // 2)):
                batch = inputs.batch(where, self.view.device)
                factor = scale / self.objective.predictions(inputs)
                prices = self._prices(lambda: loss(self.view.model, batch) * factor, band)  # noqa: B023
                costs = {name: cost + prices[name] / scale for name, cost in costs.items()}
            if all(math.isfinite(cost) for cost in costs.values()):
                return costs
            scale /= 8
        raise NumericsError("The gradient of the pruned model's loss is not finite", fix="dtype=bfloat16 or float32")

    def _prices(self, loss: Callable[[], Tensor], band: float) -> dict[str, float]:
        """Of every layer, by one backward pass."""
        prices: dict[str, Tensor] = {}

        def price(layer: Layer, gradient: Float[Tensor, "out inp"]) -> None:
            prices[layer.spec.name] = self.price(layer, gradient, band)

        layer_gradients(self.view, loss, price)
        return {name: float(prices[name]) for name in self.dense}


def kept_of(target: Target, group: int) -> int:
    """N of a target of N:M; M for a layer that stays dense.

    Raises:
        UsageError: it is one of another pattern.
    """
    if target.kept is None and target.sparsity == 0:
        return group
    if target.kept is None or target.group != group:
        raise UsageError("The plan is not one of this proxy's pattern", got=target, allowed=f"N of {group}")
    return target.kept


def fits(view: BlockView, size: int) -> bool:
    """Whether so many bytes take no more than half of what is free where the model is; on a CPU they are there."""
    if view.device.type != "cuda":
        return view.device.type == "cpu"
    devices = {layer.weight.device for layer in view.layers}
    return all(size / len(devices) <= torch.cuda.mem_get_info(device)[0] / 2 for device in devices)
