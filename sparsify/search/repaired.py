"""Pruning with the cell's own pruner, and what a zero more would cost once the other weights make up for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.errors import NumericsError
from sparsify.model.gradients import gradient_statistics
from sparsify.model.prunable import Layer
from sparsify.model.statistics import LayerStats, full_precision, reading
from sparsify.model.walk import Walk
from sparsify.pruners.base import Pruner
from sparsify.pruners.magnitude import Magnitude
from sparsify.search.proxy import PricedProxy, fits, kept_of
from sparsify.types import LayerSpec, Target

UPPER = 0.995
"""The most that is pruned to learn what more would cost."""


@dataclass(frozen=True)
class Path:
    """A layer's weights at three sparsities, from the same statistics.

    Attributes:
        weights: with less, as many and more zeros than the plan has, [out, inp] each.
        zeros: how many each was asked for, rising.
    """

    weights: tuple[Float[Tensor, "out inp"], Float[Tensor, "out inp"], Float[Tensor, "out inp"]]
    zeros: tuple[int, int, int]

    def at(self, zeros: int) -> Float[Tensor, "out inp"]:
        """The weights at another number of zeros, on straight lines between the three, and no further than these."""
        low, here, high = self.weights
        below, now, above = self.zeros
        other, far = (low, below) if zeros < now else (high, above)
        share = min((zeros - now) / (far - now), 1.0) if far != now else 0.0
        return here if share == 0 else here + share * (other - here)

    def slope(self) -> Float[Tensor, "out inp"]:
        """Change of the weights for a zero more: those that go, and what the others do about it."""
        return (self.weights[2] - self.weights[0]).float() / max(self.zeros[2] - self.zeros[0], 1)


@dataclass(kw_only=True)
class RepairedProxy(PricedProxy):
    """A model pruned by its own pruner, whose weights move along straight lines while plans near by are tried.

    `settle` prunes by a plan, `propagated`, and every layer once more with a little less and a little more, from the
    same statistics. A zero more costs the loss's derivative along that path, <g, W(s + d) - W(s - d)> over the zeros
    between: for a pruner that only ranks weights the mean of -g w over a band, as `RankProxy` has it; for one that
    updates them less, as the others make up for what goes.

    Attributes:
        pruner: of the cell.
        group: M of an N:M pattern: less and more are one of M then; None for unstructured pruning.
        reach: d, in sparsity.
    """

    pruner: Pruner
    group: int | None = None
    reach: float = 0.02
    paths: dict[str, Path] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def settle(self, targets: Mapping[str, Target]) -> None:
        """Prune by a plan, and learn what each layer is like near it."""
        self.view.restore(self.dense)
        self.paths.clear()
        near = fits(self.view, 3 * sum(layer.weight.nbytes for layer in self.view.layers))
        with full_precision():
            for layer, stats in self._walked(targets):
                spec, pruner = layer.spec, self.pruner if stats.seen else Magnitude()
                path = self._path(layer, stats, pruner, targets[spec.name], layer.weight.device if near else "cpu")
                if not all(torch.isfinite(weight).all() for weight in path.weights):
                    raise NumericsError(f"Pruning {spec.name} gave non-finite weights", fix="dtype=float32")
                self.paths[spec.name] = path
                self.current[spec.name] = self.wanted(spec, targets[spec.name])
                layer.write(path.weights[1].to(layer.weight.device))

    def _walked(self, targets: Mapping[str, Target]) -> Iterator[tuple[Layer, LayerStats]]:
        """Every layer with what its pruner reads, behind the blocks as they are pruned."""
        seen, of_gradients = reading(self.pruner.needs, "input", "pair"), reading(self.pruner.needs, "gradient")
        gradients = gradient_statistics(self.view, self.inputs, of_gradients, self.objective) if of_gradients else {}
        walk = Walk(self.view, self.inputs, self.batch_size, needs=seen) if seen else None
        for block in range(len(self.view.blocks)):
            stats = walk.observe(block, seen) if walk else {}
            for layer in self.view.layers_of(block):
                name = layer.spec.name
                yield layer, stats.get(name, LayerStats(0)).joined(gradients.get(name))
            if walk and block + 1 < len(self.view.blocks):
                walk.advance(block)

    def _path(self, layer: Layer, stats: LayerStats, pruner: Pruner, target: Target, place: torch.device | str) -> Path:
        dense, found, zeros = layer.weight, [], []
        for near in self._around(target):
            weight = pruner.prune(dense, stats, near).weight if near.sparsity > 0 else dense
            found.append(weight.to(dense.dtype, copy=True).to(place))
            zeros.append(self.wanted(layer.spec, near))
        return Path((found[0], found[1], found[2]), (zeros[0], zeros[1], zeros[2]))

    def _around(self, target: Target) -> tuple[Target, Target, Target]:
        """Less, as much and more."""
        if self.group is None:
            less, more = max(target.sparsity - self.reach, 0.0), min(target.sparsity + self.reach, UPPER)
            return Target(less), target, Target(more)
        kept = kept_of(target, self.group)
        less, more = (min(max(kept + step, 1), self.group) for step in (1, -1))
        return self._level(less), target, self._level(more)

    def _level(self, kept: int) -> Target:
        assert self.group is not None
        return Target(0.0) if kept == self.group else Target(1 - kept / self.group, kept, self.group)

    def wanted(self, layer: LayerSpec, target: Target) -> int:
        """How many zeros a plan means."""
        return round(target.sparsity * layer.numel)

    def write(self, layer: Layer, wanted: int) -> None:
        """Weights between the settled ones."""
        layer.write(self.paths[layer.spec.name].at(wanted).to(layer.weight.device))

    def price(self, layer: Layer, gradient: Float[Tensor, "out inp"], band: float) -> Float[Tensor, ""]:
        """<g, dW/dz> along the layer's path; `band` was settled with `reach`."""
        return (gradient.float() * self.paths[layer.spec.name].slope().to(gradient.device)).double().sum()
