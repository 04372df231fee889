"""Pruning by a plan: one walk through the blocks, each layer pruned once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.errors import NumericsError, SparsifyError
from sparsify.methods.observing import Regime, check_regime, observed
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import gradient_statistics
from sparsify.model.masks import Masks
from sparsify.model.objective import NextToken, Objective
from sparsify.model.prunable import Layer
from sparsify.model.statistics import GRAM, NORM, LayerStats, full_precision, reading
from sparsify.progress import Progress, silent
from sparsify.pruners.base import Pruner
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.masks import SLAB
from sparsify.types import SparsityPlan, Target


@dataclass(frozen=True)
class LayerResult:
    """What happened to one layer.

    Attributes:
        achieved: counted zeros over weights.
        error: relative error of the layer's output on the calibration text, ||(W - W')X|| / ||WX|| in Frobenius
            norm; exact with a Gram matrix, without cross terms with norms only, of the weights without data.
        seconds: time to choose and write the new weight (statistics not included).
        notes: the pruner's remarks.
    """

    block: int
    name: str
    target: float
    achieved: float
    zeros: int
    numel: int
    error: float
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BlockwisePruning:
    """A pruner and where it takes its statistics from.

    Attributes:
        pruner: how a matrix is pruned.
        regime: where a layer's statistics come from. `propagated` (the papers): the block as it was, on inputs from
            the pruned prefix. `sequential`: also from the layers already pruned inside the block. `dense`: the
            unpruned model.
        batch_size: samples per forward; no effect on what is computed but rounding.
        objective: the loss of pruners that read gradients.
    """

    pruner: Pruner
    regime: Regime = "propagated"
    batch_size: int | None = None
    objective: Objective = field(default_factory=NextToken)

    def __post_init__(self) -> None:
        check_regime(self.regime)

    @torch.no_grad()
    def apply(
        self,
        view: BlockView,
        inputs: Inputs | Int[Tensor, "n seq"],
        plan: SparsityPlan,
        masks: Masks | None = None,
        progress: Progress = silent,
    ) -> list[LayerResult]:
        """Prune the model in place and return one result per layer.

        Args:
            view: the model.
            inputs: what statistics are taken on, or token ids [n, seqlen].
            plan: how much of each layer.
            masks: filled in with what is kept.
            progress: told after each block.

        Raises:
            NumericsError: a layer's weights or statistics are unusable; the message names it.
        """
        with full_precision():
            return self._walk(view, inputs, plan, masks, progress)

    def _walk(
        self, view: BlockView, inputs: Any, plan: SparsityPlan, masks: Masks | None, progress: Progress
    ) -> list[LayerResult]:
        rows: list[LayerResult] = []
        needs = reading(self.pruner.needs, "input", "pair")
        last = max((x.spec.block for x in view.layers if plan.targets[x.spec.name].sparsity > 0), default=-1)
        gradients = self._gradients(view, inputs) if last >= 0 else {}
        for layer, stats in observed(view, inputs, needs, self.regime, self.batch_size, last, progress):
            known = stats.joined(gradients.get(layer.spec.name))
            rows.append(prune_layer(layer, known, self.pruner, plan.targets[layer.spec.name], masks))
        return rows

    def _gradients(self, view: BlockView, inputs: Any) -> dict[str, LayerStats]:
        """Statistics of the dense model's gradients, where the pruner reads any."""
        needs = reading(self.pruner.needs, "gradient")
        return gradient_statistics(view, inputs, needs, self.objective) if needs else {}


def prune_layer(
    layer: Layer, stats: LayerStats, pruner: Pruner, target: Target, masks: Masks | None = None
) -> LayerResult:
    """Prune one layer in place; a target of zero leaves it alone.

    Raises:
        SparsifyError: whatever the pruner refused, with the layer's name in front.
    """
    start = time.perf_counter()
    spec, before = layer.spec, layer.weight
    error, notes, seconds = 0.0, {}, 0.0
    if target.sparsity > 0:
        with named(spec.name):
            pruned = (pruner if stats.seen else Magnitude()).prune(before, stats, target)
        if not torch.isfinite(pruned.weight).all():
            raise NumericsError(f"Pruning {spec.name} gave non-finite weights", fix="dtype=float32")
        dense = before.clone()
        layer.write(pruned.weight.to(before.dtype))
        seconds = time.perf_counter() - start
        error, notes = output_error(dense, layer.weight, stats), pruned.notes
        if not stats.seen:
            notes = {**notes, "unseen": "no calibration token was routed here: pruned by magnitude"}
        if masks is not None:
            masks[spec.name] = pruned.keep
    zeros = int((layer.weight == 0).sum())
    if zeros < (target.sparsity - 1 / min(spec.in_features, SLAB)) * spec.numel:
        raise NumericsError(
            f"{type(pruner).__name__} pruned {spec.name} less than it was asked to",
            got=f"{zeros / spec.numel:.4f} of its weights",
            allowed=f"{target.sparsity:.4f}, up to a weight a row",
        )
    return LayerResult(
        spec.block, spec.name, target.sparsity, zeros / spec.numel, zeros, spec.numel, error, seconds, notes
    )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the layer's name in front of whatever is refused inside."""
    try:
        yield
    except SparsifyError as error:
        error.what = f"{name}: {error.what}"
        raise


def output_error(before: Float[Tensor, "out inp"], after: Float[Tensor, "out inp"], stats: LayerStats) -> float:
    """Relative Frobenius error of the layer's output, as good as the statistics allow (see `LayerResult`)."""

    def energy(weight: Tensor) -> Tensor:
        if GRAM in stats:
            return torch.sum((weight @ stats.gram) * weight)
        return torch.sum(weight.square() * stats.square if NORM in stats else weight.square())

    dense = before.float()
    whole = energy(dense)
    part = energy(dense - after.float())
    return float((part / whole.clamp_min(1e-30)).clamp_min(0).sqrt())
