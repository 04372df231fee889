"""Equimarginal allocation: prune where one weight more costs least, until it costs the same everywhere."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsify.allocators.base import Allocator
from sparsify.allocators.budget import HIGH, apply_pattern, check_widths
from sparsify.allocators.profile import Profile
from sparsify.allocators.uniform import Uniform
from sparsify.errors import NumericsError, UsageError
from sparsify.types import LayerTable, Pattern, SparsityPlan, check_whole

if TYPE_CHECKING:
    from sparsify.allocators.context import Context
    from sparsify.data.inputs import Inputs
    from sparsify.search.proxy import PricedProxy

LONGEST = 4.0
"""A layer moves at most this many times the mean step."""


@dataclass(frozen=True)
class Equimarginal(Allocator):
    """Descend the held-out loss along the sparsities of the layers, at a constant number of zeros.

    At the best split of a budget no layer can give a zero to another at a profit: the derivative of the loss by the
    number of zeros is the same in every layer (the Lagrange condition of the budget). One backward pass of the pruned
    model gives all these derivatives at once (`PricedProxy.marginal_costs`), where a search by trial needs a forward
    pass for each. Every step moves sparsity from layers in which a zero costs more than the mean to those in which it
    costs less; every `settle_every` steps the masks are settled by a propagated walk, and the best settled plan wins.

    Ours; no paper. The trials use unstructured Wanda masks whatever the cell's pruner and pattern are, unless `native`:
    then, with N:M, masks by rank within groups of M (by the cell's own scores, if its pruner only ranks weights). The
    band is the next weight to go and the next to come back of every group; the descent keeps fractions of a level, so
    that small steps add up, and tries what they round to. With `own` the cell's pruner settles every layer at three
    sparsities, and a zero costs what is left once the other weights have made up for it (`RepairedProxy`): a settling
    walk takes three times as long as pruning.

    The text is the cell's calibration and held-out text, never the test set. On the device lie the pruned weights and a
    rank of 16 bits for each of them (with `own` two more weights); gradients exist one matrix at a time, the dense
    weights on the host.

    Attributes:
        start: the allocator to start from.
        groups: one sparsity per `layer` (matrix) or per `block`.
        steps: of descent.
        rate: mean change of a layer's sparsity in the first step; four fifths of it after each third of the steps.
        momentum: share of the former direction in the next.
        band: weights around the threshold whose removal is priced, as a fraction of a row.
        windows: calibration windows of a settling walk; None for all.
        batch: held-out windows a gradient is taken on, drawn anew for every step.
        settle_every: steps between settling walks.
        native: with `pattern=mixed:M`, descend on that pattern; else the unstructured optimum is rounded to it.
        own: prune by the cell's own pruner in place of Wanda's ranks.
    """

    start: Allocator = field(default_factory=Uniform)
    groups: Literal["layer", "block"] = "layer"
    steps: int = 120
    rate: float = 0.015
    momentum: float = 0.7
    band: float = 0.04
    windows: int | None = 24
    batch: int = 8
    settle_every: int = 10
    native: bool = False
    own: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if self.groups not in ("layer", "block"):
            raise UsageError("Unknown groups", got=self.groups, allowed="layer, block")
        if min(self.steps, self.batch, self.settle_every) < 1 or not 0 < self.rate < 0.5 or not 0 < self.band < 1:
            raise UsageError(
                "The descent's settings are out of range",
                got=f"steps={self.steps}, batch={self.batch}, settle_every={self.settle_every}, rate={self.rate}, "
                f"band={self.band}",
                allowed="steps, batch, settle_every >= 1, 0 < rate < 0.5, 0 < band < 1",
            )
        check_whole("windows", self.windows, or_null=True)
        if not 0 <= self.momentum < 1:
            raise UsageError("momentum is a share", got=self.momentum, allowed="0 <= momentum < 1")

    def profile(self, layers: LayerTable, sparsity: float, context: Context) -> Profile:
        start = self.start.profile(layers, sparsity, context)
        pattern = context.pattern if self.native else Pattern()
        if pattern.group is not None:
            check_widths(layers, pattern.group)
            start = replace(start, high=min(start.high, 1 - 1 / pattern.group))
        proxies = context.repaired_proxy(self.windows, self.band / 2, pattern) if self.own else None
        with proxies or context.proxy(self.windows, pattern) as proxy:
            return self._descend(start, layers, sparsity, context, proxy, pattern)

    def _descend(
        self,
        profile: Profile,
        layers: LayerTable,
        sparsity: float,
        context: Context,
        proxy: PricedProxy,
        pattern: Pattern,
    ) -> Profile:
        text, rng, began = context.heldout_inputs(), np.random.default_rng(context.seed), time.perf_counter()
        direction = np.zeros(len(layers))
        plan = profile.fitted(layers, sparsity)
        high = HIGH if pattern.group is None else profile.high
        best, best_loss, log = profile, math.inf, []
        context.progress("step", 0, self.steps + 1)
        for step in range(self.steps + 1):
            if step % self.settle_every == 0 or step == self.steps:
                proxy.settle(apply_pattern(plan, layers, pattern).targets)
                loss = proxy.loss(text)
                log.append(_trial(step, loss, time.perf_counter() - began))
                if loss < best_loss:
                    best, best_loss = profile, loss
            if step < self.steps:
                costs = self._costs(proxy, _draw(text, self.batch, rng), layers)
                direction = self.momentum * direction + (1 - self.momentum) * costs
                rate = self.rate * 0.8 ** (3 * step // self.steps)
                profile = replace(moved(plan, direction, rate, layers), high=high)
                plan = profile.fitted(layers, sparsity)
                proxy.apply(apply_pattern(plan, layers, pattern).targets)
            context.progress("step", step + 1, self.steps + 1)
        if not math.isfinite(best_loss):
            raise NumericsError("No step of the descent gave a finite perplexity", got=log, fix="a lower sparsity")
        return replace(best, trials=tuple(log), notes={"heldout_perplexity": math.exp(best_loss)})

    def _costs(self, proxy: PricedProxy, text: Inputs, layers: LayerTable) -> Float[ndarray, " layers"]:
        """Marginal cost of a zero in every layer, less the mean over all weights."""
        by_layer = proxy.marginal_costs(text, self.band)
        costs = np.array([by_layer[layer.name] for layer in layers])
        sizes = np.array([layer.numel for layer in layers], dtype=float)
        if self.groups == "block":
            block = np.unique([layer.block for layer in layers], return_inverse=True)[1]
            costs = (np.bincount(block, costs * sizes) / np.bincount(block, sizes))[block]
        return costs - (costs * sizes).sum() / sizes.sum()


def moved(plan: SparsityPlan, direction: Float[ndarray, " layers"], rate: float, layers: LayerTable) -> Profile:
    """The plan one step against `direction`, whose mean absolute value is taken as one."""
    unit = direction / (np.abs(direction).mean() or 1.0)
    step = rate * np.clip(unit, -LONGEST, LONGEST)
    now = plan.sparsities()
    return Profile({x.name: now[x.name] - float(s) for x, s in zip(layers, step, strict=True)})


def _draw(text: Inputs, count: int, rng: np.random.Generator) -> Inputs:
    return text.take(rng.choice(len(text), size=min(count, len(text)), replace=False).tolist())


def _trial(step: int, loss: float, seconds: float) -> dict[str, float | None]:
    return {"step": float(step), "heldout_perplexity": math.exp(loss) if loss < 700 else None, "seconds": seconds}
