"""Stages that put the weights of a pruned model on grids of few levels: rounding to nearest, and GPTQ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsify.allocators.base import Allocator
from sparsify.allocators.bits import LEVELS, check_bits, shared_bits, sparsity_of
from sparsify.allocators.uniform import Uniform
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.base import Stage, StageResult
from sparsify.methods.blockwise import named, output_error
from sparsify.methods.job import Job
from sparsify.methods.observing import Regime, check_regime, observed
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.model.prunable import Layer
from sparsify.model.statistics import GRAM, LayerStats, full_precision
from sparsify.pruners.sparsegpt import InverseFactor, inverse_factor
from sparsify.quantisation.gptq import Quantised, quantise, round_to_nearest
from sparsify.quantisation.grid import Grid, Precision, scale_dtype
from sparsify.quantisation.size import Stored, sizes
from sparsify.types import SparsityPlan, check_whole


@dataclass(frozen=True, kw_only=True)
class Quantising:
    """How finely weights are quantised, and what every way of doing it shares.

    Attributes:
        bits: of every weight; or, where an allocator shares them out by block, their mean over all weights.
        allocator: a rule for sparsity, asked for 1 - bits / 16 about the dense model: the sparser it would have a
            block, the fewer bits that gets (`allocators.bits`). A search tries plans by rounding to nearest.
        group: neighbouring inputs of a row that share a scale; None for the whole row.
        symmetric: whether the levels lie around zero instead of where the group's weights do.
    """

    place: ClassVar[str] = "quantiser"
    bits: int | float = 4
    allocator: Allocator = field(default_factory=Uniform)
    group: int | None = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.allocator, Allocator):
            fix = f"allocator@{self.place}.allocator=<name>"
            raise UsageError("allocator is a component, not a value", got=repr(self.allocator)[:80], fix=fix)
        check_bits(self.bits)
        if isinstance(self.allocator, Uniform) and self.bits not in LEVELS:
            raise UsageError(
                "A weight has a whole number of bits",
                got=f"bits={self.bits:g}",
                allowed=", ".join(map(str, LEVELS)),
                fix=f"{self.place}.bits=4, or allocator@{self.place}.allocator=atp_relative, which shares out a mean",
            )
        check_whole("group", self.group, 2, or_null=True)

    def prepare(self, job: Job) -> None:
        """Share out the bits, as long as the model is dense."""
        job.prepared[id(self)] = self._shared(job)

    def _shared(self, job: Job) -> tuple[dict[str, int], dict[str, Any]]:
        """Bits by layer, and what the allocator noted and tried."""
        table = job.view.table
        if isinstance(self.allocator, Uniform):
            return dict.fromkeys((layer.name for layer in table), int(self.bits)), {}

        def change(plan: SparsityPlan) -> bool:
            bits = shared_bits(table, plan.sparsities(), self.bits)
            for layer in job.view.layers:
                put(layer, round_to_nearest(*self._matrix(layer, None), *self._fineness(layer, bits)))
            return True

        plan = job.share(self.allocator, sparsity_of(self.bits), change)
        told = {f"allocator.{key}": value for key, value in plan.notes.items()}
        told |= {"trials": [dict(trial) for trial in plan.trials]} if plan.trials else {}
        return shared_bits(table, plan.sparsities(), self.bits), told

    def _matrix(self, layer: Layer, masks: Masks | None) -> tuple[Tensor, Tensor]:
        """A layer's weight and mask, which keeps all of a layer that is in no masks."""
        weight = layer.weight
        if masks is None or layer.spec.name not in masks:
            return weight, torch.ones_like(weight, dtype=torch.bool)
        return weight, masks[layer.spec.name].to(weight.device)

    def _fineness(self, layer: Layer, bits: Mapping[str, int]) -> tuple[Precision, torch.dtype]:
        """How fine a layer's grid is, and in which dtype its scales are stored."""
        return Precision(bits[layer.spec.name], self.group, self.symmetric), scale_dtype(layer.weight.dtype)

    def _notes(self, view: BlockView, masks: Masks, grids: Mapping[str, Grid]) -> dict[str, Any]:
        """Bits by block, what the model takes, and which zeros are the mask's and which are rounded weights."""
        kept = {name: int(masks[name].sum()) for name in masks}
        stored = {
            name: Stored(kept.get(name), grid.precision.bits, grid.scale.numel(), not self.symmetric)
            for name, grid in grids.items()
        }
        pruned = sum(x.spec.numel - kept[x.spec.name] for x in view.layers if x.spec.name in kept) / view.table.numel
        bits = {layer.block: grids[layer.name].precision.bits for layer in view.table}
        mean = sum(grids[layer.name].precision.bits * layer.numel for layer in view.table) / view.table.numel
        zeros = {"pruned": pruned, "rounded_to_zero": view.sparsity() - pruned}
        return {"mean_bits": mean, "block_bits": [bits[b] for b in sorted(bits)], **sizes(view.table, stored), **zeros}


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(Quantising, Stage):
    """Every kept weight goes to the nearest level of its group's grid; no text is read.

    The baseline of GPTQ (arXiv 2210.17323).
    """

    version: int = 1

    @torch.no_grad()
    def apply(self, view: BlockView, masks: Masks, job: Job) -> StageResult:
        bits, told = job.prepared[id(self)]
        grids, errors = dict[str, Grid](), dict[str, float]()
        for layer in view.layers:
            found = round_to_nearest(*self._matrix(layer, masks), *self._fineness(layer, bits))
            errors[layer.spec.name], grids[layer.spec.name] = put(layer, found), found.grid.to("cpu")
        return StageResult(masks, self._notes(view, masks, grids) | told | {"errors": errors}, grids=grids)


@dataclass(frozen=True, kw_only=True)
class GPTQ(Quantising, Stage):
    """Column by column, each error made up for by the kept weights to its right (`quantisation.gptq.quantise`).

    One walk over the blocks, whose inputs come from the blocks before as they are quantised. An expert that no token
    was routed to is rounded to nearest, and named in the record.

    Attributes:
        damp: fraction of the mean of diag(H) added to the diagonal; raised tenfold while H cannot be factorised.
        order: of the columns: `columns`, from left to right; or `activations`, the largest diag(H) first, with grids
            fitted before the walk, so that groups are still those of neighbours.
        regime: where statistics come from (`methods.observing.observed`).
    """

    damp: float = 0.01
    order: Literal["columns", "activations"] = "columns"
    regime: Regime = "propagated"
    version: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_regime(self.regime)
        if self.order not in ("columns", "activations"):
            raise UsageError("Unknown order of columns", got=self.order, allowed="columns, activations")
        if not 0 < self.damp < float("inf"):
            got, fix = f"damp={self.damp}", "quantiser.damp=0.01"
            raise UsageError("GPTQ needs a positive damping", got=got, allowed="damp > 0", fix=fix)

    @torch.no_grad()
    def apply(self, view: BlockView, masks: Masks, job: Job) -> StageResult:
        bits, told = job.prepared[id(self)]
        grids, errors, unseen = dict[str, Grid](), dict[str, float](), list[str]()
        needs = frozenset({GRAM})
        with full_precision():
            for layer, stats in observed(
                view, job.calibration, needs, self.regime, job.batch_size, progress=job.progress
            ):
                name = layer.spec.name
                with named(name):
                    found = self._solved(layer, masks, bits, stats)
                errors[name], grids[name] = put(layer, found, stats), found.grid.to("cpu")
                unseen += [] if stats.seen else [name]
        notes = self._notes(view, masks, grids) | told | {"errors": errors}
        return StageResult(masks, notes | ({"unseen": unseen} if unseen else {}), grids=grids)

    def _solved(self, layer: Layer, masks: Masks, bits: Mapping[str, int], stats: LayerStats) -> Quantised:
        weight, keep = self._matrix(layer, masks)
        if not stats.seen:
            return round_to_nearest(weight, keep, *self._fineness(layer, bits))
        order, factor = self._factor(stats)
        return quantise(weight, keep, factor, *self._fineness(layer, bits), order)

    def _factor(self, stats: LayerStats) -> tuple[Tensor | None, InverseFactor]:
        """The order of the columns and the factor in it, shared by all layers that read the same input."""
        if self.order == "columns":
            return None, stats.once(("inverse", self.damp), lambda: inverse_factor(stats.gram, self.damp))
        order = stats.gram.diagonal().argsort(descending=True, stable=True)
        sorted_gram = stats.gram[order][:, order]
        return order, stats.once(("inverse", self.damp, self.order), lambda: inverse_factor(sorted_gram, self.damp))


def put(layer: Layer, found: Quantised, stats: LayerStats | None = None) -> float:
    """Write a quantised matrix; zeros that it had where nothing is kept stay to the bit, sign included.

    Returns:
        The relative error of the layer's output that quantising made, as good as the statistics allow.

    Raises:
        NumericsError: it is not finite; the message names the layer.
    """
    before = layer.weight.clone()
    new = torch.where(found.keep, found.weight.to(before.dtype), before.masked_fill(before != 0, 0.0))
    if not torch.isfinite(new).all():
        raise NumericsError(f"Quantising {layer.spec.name} gave non-finite weights", fix="dtype=float32")
    layer.write(new)
    return output_error(before, layer.weight, stats or LayerStats(0))
