"""Pruned weights at every level, stored: for pruners that change the weights that they keep (SparseGPT)."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.data.inputs import Inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.gradients import gradient_statistics
from sparsify.model.objective import Objective
from sparsify.model.prunable import Layer
from sparsify.model.statistics import LayerStats, full_precision, reading
from sparsify.model.walk import Walk
from sparsify.pruners.base import Pruner
from sparsify.pruners.magnitude import Magnitude
from sparsify.search.proxy import ModelProxy, Proxy, fits, kept_of
from sparsify.search.ranks import RankProxy, ranked
from sparsify.types import LayerSpec, Target

Place = Literal["memory", "disk"]


@dataclass(kw_only=True)
class LevelStore(ModelProxy):
    """Every layer at every level of N:M, pruned once from the dense model's statistics (the database of EvoPress).

    All levels of a layer are pruned with the same statistics object, so that what a pruner derives from it (SparseGPT's
    factorisation) is derived once, also for layers that share their input. The dense level is not stored.

    Attributes:
        pruner: of the cell.
        group: M.
        levels: kept counts N that plans may ask for.
        place: `memory`, on the model's device where that leaves half of it free, else on the host; or `disk`, files
            mapped into memory and removed at the end.
        weights: [levels, out, inp] by layer name, in the model's precision.
    """

    pruner: Pruner
    group: int
    levels: Sequence[int]
    place: Place = "memory"
    weights: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stored = [kept for kept in sorted(set(self.levels)) if kept < self.group]

    @property
    def nbytes(self) -> int:
        """Size of the store."""
        one: int = sum(layer.weight.nbytes for layer in self.view.layers)
        return len(self.stored) * one

    @contextmanager
    def closing(self) -> Iterator[Any]:
        """Build the store; remove it and leave the model dense, whatever happened.

        Raises:
            UsageError: it does not fit; the message says how much is needed.
        """
        with super().closing(), self._allocated() as allocate:
            self._build(allocate)
            try:
                yield self
            finally:
                self.weights.clear()

    @contextmanager
    def _allocated(self) -> Iterator[Callable[[Layer], Tensor]]:
        """Makes room for a layer's levels, all checked against what is free."""
        if self.place == "memory":
            near = self.view.device.type != "cpu" and fits(self.view, self.nbytes)
            if not near:
                check_space(self.nbytes, psutil.virtual_memory().available, self.place)
            yield lambda layer: torch.empty(
                self._shape(layer), dtype=layer.weight.dtype, device=layer.weight.device if near else "cpu"
            )
            return
        check_space(self.nbytes, shutil.disk_usage(tempfile.gettempdir()).free, self.place)
        with tempfile.TemporaryDirectory(prefix="sparsify-levels-") as folder:
            yield lambda layer: self._mapped(layer, Path(folder))

    def _shape(self, layer: Layer) -> tuple[int, int, int]:
        return len(self.stored), layer.spec.out_features, layer.spec.in_features

    def _mapped(self, layer: Layer, folder: Path) -> Tensor:
        shape, file = self._shape(layer), str(folder / layer.spec.name)
        size = shape[0] * shape[1] * shape[2]
        return torch.from_file(file, shared=True, size=size, dtype=layer.weight.dtype).reshape(shape)

    @torch.no_grad()
    def _build(self, allocate: Callable[[Layer], Tensor]) -> None:
        """One walk through the dense model, every layer pruned to all levels."""
        targets = [Target(1 - kept / self.group, kept, self.group) for kept in self.stored]
        with full_precision():
            for layer, stats in self._observed():
                pruner = self.pruner if stats.seen else Magnitude()  # as pruning does with experts without a token
                levels = allocate(layer)
                for level, target in zip(levels, targets, strict=True):
                    level.copy_(pruner.prune(layer.weight, stats, target).weight)
                if not torch.isfinite(levels).all():
                    raise NumericsError(f"Pruning {layer.spec.name} gave non-finite weights", fix="dtype=float32")
                self.weights[layer.spec.name] = levels

    def _observed(self) -> Iterator[tuple[Layer, LayerStats]]:
        """Each layer with its statistics in the dense model."""
        needs = reading(self.pruner.needs, "input", "pair")
        of_gradients = reading(self.pruner.needs, "gradient")
        gradients = gradient_statistics(self.view, self.inputs, of_gradients, self.objective) if of_gradients else {}
        walk = Walk(self.view, self.inputs, self.batch_size, needs=needs) if needs else None
        for block in range(len(self.view.blocks)):
            stats = walk.observe(block, needs, advance=True) if walk else {}
            for layer in self.view.layers_of(block):
                name = layer.spec.name
                yield layer, stats.get(name, LayerStats(0)).joined(gradients.get(name))

    def wanted(self, layer: LayerSpec, target: Target) -> int:
        """How many of every M weights are kept."""
        return kept_of(target, self.group)

    def write(self, layer: Layer, wanted: int) -> None:
        """The stored weights of that level; the dense ones for keeping all."""
        layer.write(self.dense_weight(layer) if wanted == self.group else self._stored(layer.spec.name, wanted))

    def _stored(self, name: str, kept: int) -> Float[Tensor, "out inp"]:
        return self.weights[name][self.stored.index(kept)]


def check_space(needed: int, free: int, place: Place) -> None:
    """Refuse a store that does not fit, before any of it is built.

    Raises:
        UsageError: with the size that is needed.
    """
    if needed > free:
        raise UsageError(
            f"The pruned weights at every level do not fit {'in memory' if place == 'memory' else 'on the disk'}",
            got=f"{needed:,} bytes ({needed / 2**30:.2f} GiB) needed, {free:,} free",
            fix="fewer levels (allocator.low, allocator.high)"
            + (", or allocator.store=disk" if place == "memory" else ", or TMPDIR on a larger disk"),
        )


@contextmanager
def level_proxy(
    view: BlockView,
    dense: DenseModel,
    inputs: Inputs,
    objective: Objective,
    pruner: Pruner,
    group: int,
    levels: Sequence[int],
    place: Place = "memory",
) -> Iterator[Proxy]:
    """What stands in for this pruner at levels of N:M, on dense statistics; the model is dense again afterwards.

    Ranks for a pruner that only ranks weights among their neighbours, for any other a store of what it makes of them.

    Raises:
        UsageError: a store that does not fit.
    """
    if ranked(pruner):
        ranks = RankProxy(view, dense, inputs, objective, pruner, group)
        with ranks.closing():
            ranks.settle({layer.name: Target(0.0) for layer in view.table})
            yield ranks
    else:
        store = LevelStore(view, dense, inputs, objective, pruner=pruner, group=group, levels=levels, place=place)
        with store.closing():
            yield store
