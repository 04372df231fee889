"""Pruning by rank: any plan on a whole model in milliseconds, so that a search can try thousands of them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView, Layer
from sparsify.model.loss import batch_size_for, summed_loss
from sparsify.model.walk import Walk
from sparsify.pruners.masks import num_zeros
from sparsify.pruners.wanda import wanda_scores


@dataclass
class Screen:
    """A model under Wanda masks whose ranks stay fixed while plans are tried.

    A weight's rank among the Wanda scores of its output row is taken once, at a reference plan (`settle`). From then
    on pruning by another plan is one comparison per weight. At the reference plan the masks are those of propagated
    Wanda pruning on the same text; the further a plan is from it, the rougher they are. With the dense model as
    reference they are those of the `dense` regime.

    Attributes:
        view: the model; `closing` puts its weights back.
        dense: its weights before pruning, [out, inp] by layer name.
        tokens: calibration token ids, [n, seqlen].
        ranks: of every weight in its row, lowest score first, [out, inp] by layer name.
        zeros: per row, of the plan in place.
    """

    view: BlockView
    dense: Mapping[str, Tensor]
    tokens: Int[Tensor, "n seq"]
    ranks: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch_size = batch_size_for(self.view.device, self.tokens.shape[1])
        self.summed = summed_loss(self.view.model, self.tokens[:1, :8].to(self.view.device))

    @contextmanager
    def closing(self) -> Iterator["Screen"]:
        """Leave the model dense, whatever happened."""
        try:
            yield self
        finally:
            self.view.restore(self.dense)

    @torch.no_grad()
    def settle(self, sparsities: Mapping[str, float]) -> None:
        """Take the ranks from a propagated walk that prunes by this plan; the model is left pruned by it."""
        self.view.restore(self.dense)
        walk = Walk(self.view, self.tokens, self.batch_size)
        last = len(self.view.blocks) - 1
        for block in range(last + 1):
            stats = walk.observe(block, frozenset({"norm"}))
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
        layer.write(self.dense[name] * (self.ranks[name] >= self.zeros[name]))

    @torch.no_grad()
    def loss(self, tokens: Int[Tensor, "m seq"]) -> float:
        """Mean cross-entropy in nats per predicted token of the model as it is pruned now; infinite if not a number."""
        total = sum(float(self.summed(self.view.model, batch)) for batch in self._batches(tokens, self.batch_size))
        mean = total / (len(tokens) * (tokens.shape[1] - 1))
        return mean if math.isfinite(mean) else math.inf

    def _batches(self, tokens: Int[Tensor, "m seq"], size: int) -> Iterator[Tensor]:
        return (batch.to(self.view.device) for batch in tokens.split(size))

    def marginal_costs(self, tokens: Int[Tensor, "m seq"], band: float) -> dict[str, float]:
        """What pruning one weight more in each layer adds to the loss, to first order, in nats per token.

        The weights just above and just below the threshold of their row are the next to go and the next to come back.
        Setting such a weight to zero changes the loss by -g w, with g its gradient where the model stands now (of a
        weight that is zero already, too); the mean over the band is the derivative of the loss by the number of zeros.

        Args:
            tokens: text whose loss counts, [m, seqlen].
            band: width of the band as a fraction of the row, half of it on either side.

        Raises:
            NumericsError: a gradient is not finite at any loss scale.
        """
        scale = 1024.0
        while scale >= 1.0:  # half-precision gradients underflow unscaled and overflow scaled too much
            costs = torch.zeros(len(self.view.layers), dtype=torch.float64)
            for batch in self._batches(tokens, max(1, self.batch_size // 2)):
                costs += self._band_products(batch, band, scale / (tokens.numel() - len(tokens))).cpu() / scale
            if torch.isfinite(costs).all():
                return {layer.spec.name: float(cost) for layer, cost in zip(self.view.layers, costs, strict=True)}
            scale /= 8
        raise NumericsError("The gradient of the pruned model's loss is not finite", fix="dtype=bfloat16 or float32")

    def _band_products(self, batch: Int[Tensor, "b seq"], band: float, scale: float) -> Float[Tensor, " layers"]:
        """Mean of -g w over every layer's band, for the scaled loss of one batch."""
        weights = [layer.module.weight for layer in self.view.layers]
        with _requiring_gradients(weights), torch.enable_grad():
            gradients = torch.autograd.grad(self.summed(self.view.model, batch) * scale, weights)
        products = [
            -(layer.oriented(gradient).float() * self.dense[layer.spec.name] * near).double().sum() / near.sum()
            for layer, gradient in zip(self.view.layers, gradients, strict=True)
            for near in [self._band(layer, band)]
        ]
        return torch.stack(products)

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


@contextmanager
def _requiring_gradients(weights: list[Tensor]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
