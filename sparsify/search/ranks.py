"""Pruning by rank: a weight's rank says at which targets it goes, so that a plan is one comparison per weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.gradients import gradient_statistics
from sparsify.model.objective import Objective
from sparsify.model.prunable import Layer
from sparsify.model.statistics import LayerStats, full_precision, reading
from sparsify.model.walk import Walk
from sparsify.pruners.base import Pruner, ScorePruner
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.masks import num_zeros
from sparsify.pruners.wanda import Wanda
from sparsify.search.proxy import PricedProxy, kept_of
from sparsify.types import LayerSpec, Target


@dataclass
class RankProxy(PricedProxy):
    """A model under masks whose ranks stay fixed while plans are tried.

    A weight's rank among the scores of its output row, or of its group of M consecutive inputs, is taken once, at a
    reference plan (`settle`). From then on pruning by another plan is one comparison per weight. At the reference plan
    the masks are those of propagated pruning on the same text; the further a plan is from it, the rougher they are.
    With the dense model as reference they are those of the `dense` regime, of every N at once.

    Attributes:
        pruner: whose scores are ranked.
        group: M of an N:M pattern, at most 127; None for rows.
        ranks: of every weight, lowest score first, [out, inp] by layer name; one byte each for groups.
    """

    pruner: ScorePruner = field(default_factory=Wanda)
    group: int | None = None
    ranks: dict[str, Tensor] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def settle(self, targets: Mapping[str, Target]) -> None:
        """Take the ranks from a propagated walk that prunes by this plan; the model is left pruned by it."""
        self.view.restore(self.dense)
        needs, gradients = self.pruner.needs, self._gradients()
        seen = reading(needs, "input", "pair")
        walk = Walk(self.view, self.inputs, self.batch_size, needs=seen) if seen else None
        last = len(self.view.blocks) - 1
        dense = not any(target.sparsity for target in targets.values())  # blocks stay: one pass gives both
        for block in range(last + 1):
            with full_precision():
                stats = walk.observe(block, seen, advance=dense) if walk else {}
            for layer in self.view.layers_of(block):
                name = layer.spec.name
                known = stats.get(name, LayerStats(0)).joined(gradients.get(name))
                self.ranks[name] = self._ranks(layer, known)
                self.current[name] = self.wanted(layer.spec, targets[name])
                self.write(layer, self.current[name])
            if walk and block < last and not dense:
                walk.advance(block)

    def _gradients(self) -> dict[str, LayerStats]:
        """Statistics of the dense model's gradients, where the scores read any."""
        needs = reading(self.pruner.needs, "gradient")
        return gradient_statistics(self.view, self.inputs, needs, self.objective) if needs else {}

    def _ranks(self, layer: Layer, stats: LayerStats) -> Int[Tensor, "out inp"]:
        if self.group is None:
            return row_ranks(self.pruner.score(layer.weight, stats))
        pruner = self.pruner if stats.seen else Magnitude()  # as pruning does with experts that saw no token
        return group_ranks(pruner.score(layer.weight, stats), self.group)

    def wanted(self, layer: LayerSpec, target: Target) -> int:
        """How many weights of every row, or of every group of M, are zero."""
        if self.group is None:
            return num_zeros(layer.in_features, target.sparsity)
        return self.group - kept_of(target, self.group)

    def write(self, layer: Layer, wanted: int) -> None:
        """The dense weights, zero below a rank."""
        layer.write(self.dense_weight(layer) * (self.ranks[layer.spec.name] >= wanted))

    def price(self, layer: Layer, gradient: Float[Tensor, "out inp"], band: float) -> Float[Tensor, ""]:
        """Mean of -g w over the weights just above and just below the threshold of their row.

        They are the next to go and the next to come back. Setting such a weight to zero changes the loss by -g w, with
        g its gradient where the model stands now (of a weight that is zero already, too); the mean over the band is
        the derivative of the loss by the number of zeros.
        """
        near = self._band(layer, band)
        return -(gradient.float() * self.dense_weight(layer) * near).double().sum() / near.sum()

    def _band(self, layer: Layer, band: float) -> Bool[Tensor, "out inp"]:
        """Weights whose rank is within half a band of the threshold: of a group, the next to go and to come back."""
        ranks, threshold = self.ranks[layer.spec.name], self.current[layer.spec.name]
        reach = max(1, round(band / 2 * (self.group or layer.spec.in_features)))
        return (ranks >= threshold - reach) & (ranks < threshold + reach)


def rank_proxy(
    view: BlockView, dense: DenseModel, inputs: Inputs, objective: Objective, pruner: Pruner | None, group: int | None
) -> RankProxy:
    """Ranks within groups of M by a pruner's own scores, if it only ranks; else, and within rows, by Wanda's."""
    scores = pruner if group is not None and ranked(pruner) else Wanda()
    return RankProxy(view, dense, inputs, objective, scores, group)


def ranked(pruner: Pruner | None) -> TypeGuard[ScorePruner]:
    """Whether ranks within groups of M neighbours say what a pruner does at every N."""
    return isinstance(pruner, ScorePruner) and pruner.by_neighbours


def row_ranks(scores: Float[Tensor, "out inp"]) -> Int[Tensor, "out inp"]:
    """Position of each score in its row's ascending order, leftmost first among equals; 16 bits where they suffice."""
    order = scores.argsort(dim=1, stable=True)
    kind = torch.int16 if scores.shape[1] < 2**15 else torch.int32
    places = torch.arange(scores.shape[1], dtype=kind, device=scores.device).expand_as(order)
    return torch.empty_like(order, dtype=kind).scatter_(1, order, places)


def group_ranks(scores: Float[Tensor, "out inp"], group: int) -> Int[Tensor, "out inp"]:
    """Position of each score among its `group` consecutive ones, as `row_ranks` has it, in 8 bits."""
    return row_ranks(scores.reshape(-1, group)).to(torch.int8).reshape(scores.shape)
