"""Pruning by rank: any plan on a whole model in milliseconds, so that a search can try thousands of them."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsify.data.inputs import Inputs, batches
from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.gradients import layer_gradients
from sparsify.model.objective import Objective, batch_size_for, mean_loss
from sparsify.model.prunable import Layer
from sparsify.model.statistics import NORM
from sparsify.model.walk import Walk
from sparsify.pruners.masks import num_zeros
from sparsify.pruners.wanda import wanda_scores


@dataclass
class Proxy:
    """A model under Wanda masks whose ranks stay fixed while plans are tried: a cheap stand-in for pruning it.

    A weight's rank among the Wanda scores of its output row is taken once, at a reference plan (`settle`). From then
    on pruning by another plan is one comparison per weight. At the reference plan the masks are those of propagated
    Wanda pruning on the same text; the further a plan is from it, the rougher they are. With the dense model as
    reference they are those of the `dense` regime.

    Attributes:
        view: the model; `closing` puts its weights back.
        dense: the model before pruning.
        inputs: for calibration.
        objective: the loss.
        ranks: of every weight in its row, lowest score first, [out, inp] by layer name.
        zeros: per row, of the plan in place.
    """

    view: BlockView
    dense: DenseModel
    inputs: Inputs
    objective: Objective
    ranks: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch_size = batch_size_for(self.view.device, self.inputs.length)

    @contextmanager
    def closing(self) -> Iterator["Proxy"]:
        """Leave the model dense, whatever happened."""
        try:
            yield self
        finally:
            self.view.restore(self.dense)

    @torch.no_grad()
    def settle(self, sparsities: Mapping[str, float]) -> None:
        """Take the ranks from a propagated walk that prunes by this plan; the model is left pruned by it."""
        self.view.restore(self.dense)
        walk = Walk(self.view, self.inputs, self.batch_size)
        last = len(self.view.blocks) - 1
        for block in range(last + 1):
            stats = walk.observe(block, frozenset({NORM}))
            for layer in self.view.layers_of(block):
                self.ranks[layer.spec.name] = row_ranks(wanda_scores(layer.weight, stats[layer.spec.name].norm))
                self._write(layer, sparsities[layer.spec.name])
            if block < last:
                walk.advance(block)

    @torch.no_grad()
    def apply(self, sparsities: Mapping[str, float]) -> None:
        """Prune by another plan, with the ranks as they are."""
        for layer in self.view.layers:
            self._write(layer, sparsities[layer.spec.name])

    def _write(self, layer: Layer, sparsity: float) -> None:
        name = layer.spec.name
        self.zeros[name] = num_zeros(layer.spec.in_features, sparsity)
        layer.write(self._dense(layer) * (self.ranks[name] >= self.zeros[name]))

    def _dense(self, layer: Layer) -> Float[Tensor, "out inp"]:
        """The dense weight on the layer's device, for as long as it is used."""
        return self.dense[layer.spec.name].to(layer.weight.device, non_blocking=True)

    def loss(self, inputs: Inputs) -> float:
        """Mean loss in nats per prediction of the model as it is pruned now; infinite if not a number."""
        mean = mean_loss(self.view.model, inputs, self.objective, batch_size=self.batch_size)
        return mean if math.isfinite(mean) else math.inf

    def marginal_costs(self, inputs: Inputs, band: float) -> dict[str, float]:
        """What pruning one weight more in each layer adds to the loss, to first order, in nats per prediction.

        The weights just above and just below the threshold of their row are the next to go and the next to come back.
        Setting such a weight to zero changes the loss by -g w, with g its gradient where the model stands now (of a
        weight that is zero already, too); the mean over the band is the derivative of the loss by the number of zeros.

        Args:
            inputs: whose loss counts.
            band: width of the band as a fraction of the row, half of it on either side.

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
                products = self._band_products(lambda: loss(self.view.model, batch) * factor, band)  # noqa: B023
                costs = {name: cost + products[name] / scale for name, cost in costs.items()}
            if all(math.isfinite(cost) for cost in costs.values()):
                return costs
            scale /= 8
        raise NumericsError("The gradient of the pruned model's loss is not finite", fix="dtype=bfloat16 or float32")

    def _band_products(self, loss: Callable[[], Tensor], band: float) -> dict[str, float]:
        """Mean of -g w over every layer's band, by layer name."""
        products: dict[str, Tensor] = {}

        def price(layer: Layer, gradient: Float[Tensor, "out inp"]) -> None:
            near = self._band(layer, band)
            lost = -(gradient.float() * self._dense(layer) * near).double().sum()
            products[layer.spec.name] = lost / near.sum()

        layer_gradients(self.view, loss, price)
        return {name: float(products[name]) for name in self.dense}

    def _band(self, layer: Layer, band: float) -> Bool[Tensor, "out inp"]:
        """Weights whose rank is within half a band of the threshold."""
        ranks, threshold = self.ranks[layer.spec.name], self.zeros[layer.spec.name]
        reach = max(1, round(band / 2 * layer.spec.in_features))
        return (ranks >= threshold - reach) & (ranks < threshold + reach)


def row_ranks(scores: Float[Tensor, "out inp"]) -> Int[Tensor, "out inp"]:
    """Position of each score in its row's ascending order, leftmost first among equals; 16 bits where they suffice."""
    order = scores.argsort(dim=1, stable=True)
    kind = torch.int16 if scores.shape[1] < 2**15 else torch.int32
    places = torch.arange(scores.shape[1], dtype=kind, device=scores.device).expand_as(order)
    return torch.empty_like(order, dtype=kind).scatter_(1, order, places)
