"""What pruning a single block or a single matrix does to the loss, all others dense."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsify.analysis.units import Groups, check_groups, units
from sparsify.data.inputs import Inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken, Objective
from sparsify.model.prunable import Layer
from sparsify.model.statistics import LayerStats, full_precision, reading
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent
from sparsify.pruners.base import Pruner
from sparsify.pruners.magnitude import Magnitude
from sparsify.types import Target


@torch.no_grad()
def pruning_damage(
    view: BlockView,
    calibration: Inputs,
    text: Inputs,
    pruner: Pruner,
    targets: Mapping[str, Target],
    *,
    groups: Groups = "block",
    objective: Objective | None = None,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Float[Tensor, "units windows"]:
    """Rise of the loss of every window, in nats per prediction, when one unit alone is pruned.

    Statistics are those of the model as it stands (`dense`), taken once for all units. A forward pass a unit and
    window, from the pruned block on; the states of `text` behind every block are kept meanwhile.

    Args:
        view: the dense model; its weights are what they were when this returns or raises.
        calibration: what statistics are taken on.
        text: whose loss counts.
        pruner: how a matrix is pruned; its statistics are of inputs.
        targets: what is asked of every matrix, by layer name.
        groups: a unit is a `block` or a `layer` (matrix); in the order of the model.
        objective: the loss; next tokens for None.
        batch_size: samples per forward of the walk; None picks one for the device.
        progress: told after each unit.

    Raises:
        UsageError: a pruner that reads gradients or pairs.
        NumericsError: a loss is not finite; the message names the unit.
    """
    check_groups(groups)
    if odd := reading(pruner.needs, "pair", "gradient"):
        raise UsageError("Units are pruned on statistics of their inputs", got=sorted(map(repr, odd)), fix="wanda")
    losses = _Losses(view, text, objective or NextToken())
    every = units(view.table, groups)
    rises: list[Tensor] = []
    walk = Walk(view, calibration, batch_size) if pruner.needs else None
    with full_precision():
        for block in range(len(view.blocks)):
            pruned = _pruned(view, walk, block, pruner, targets)
            before = {layer.spec.name: layer.weight.clone() for layer in view.layers_of(block)}
            for unit in (unit for unit in every if unit[0] in pruned):
                with view.replaced(block, before | {name: pruned[name] for name in unit}):
                    named = f"block {block}" if groups == "block" else unit[0]
                    rises.append(losses.changed(block, named) - losses.dense)
                progress("unit", len(rises), len(every))
    return torch.stack(rises)


def _pruned(
    view: BlockView, walk: Walk | None, block: int, pruner: Pruner, targets: Mapping[str, Target]
) -> dict[str, Tensor]:
    """The matrices of a block as the pruner leaves them, by layer name; the walk goes on to the next block."""
    layers = view.layers_of(block)
    stats = walk.observe(block, pruner.needs, advance=True) if walk else {x.spec.name: LayerStats(0) for x in layers}

    def weight(layer: Layer, known: LayerStats) -> Tensor:
        method = pruner if known.seen else Magnitude()  # an expert that no token was routed to
        pruned: Tensor = method.prune(layer.weight, known, targets[layer.spec.name]).weight
        return pruned.to(layer.weight.dtype)

    return {layer.spec.name: weight(layer, stats[layer.spec.name]) for layer in layers}


class _Losses:
    """The loss of single windows, in nats per prediction: of the dense model, and with one block changed.

    What the blocks put out for every window is kept, [seq, dim] a window and block, so that those before the changed
    one need not run again.
    """

    def __init__(self, view: BlockView, text: Inputs, objective: Objective) -> None:
        self.view, self.text = view, text
        self.loss = objective.prepare(view.model, text)
        self.predictions = objective.predictions(text) / len(text)
        self.skips = not Walk(view, text.few(), 1).stateful  # blocks that hand on more than states all run
        self.outputs: list[list[Any]] = []
        self.dense = self._checked([self._recorded(i) for i in range(len(text))], "dense model")

    def changed(self, block: int, name: str) -> Float[Tensor, " windows"]:
        """Of the model as it stands, which differs from the dense one in this block at most."""
        found = []
        for i, outputs in enumerate(self.outputs):
            with _returning(self.view.blocks[:block] if self.skips else [], outputs):
                found.append(self._of_window(i))
        return self._checked(found, f"model with only {name} pruned")

    def _recorded(self, window: int) -> float:
        outputs: list[Any] = []
        handles = [b.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for b in self.view.blocks]
        try:
            return self._of_window(window)
        finally:
            for handle in handles:
                handle.remove()
            self.outputs.append(outputs)

    def _of_window(self, i: int) -> float:
        batch = self.text.batch(slice(i, i + 1), self.view.device)
        return float(self.loss(self.view.model, batch)) / self.predictions

    def _checked(self, found: list[float], what: str) -> Float[Tensor, " windows"]:
        if not all(map(math.isfinite, found)):
            fix = "a lower sparsity, or dtype=float32 if this is half precision"
            raise NumericsError(f"The loss of the {what} is not finite", got=found, fix=fix)
        return torch.tensor(found, dtype=torch.float64)


@contextmanager
def _returning(blocks: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Blocks that do not run but return these."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = lambda *_args, output=output, **_kwargs: output
        yield
    finally:
        for block, replaced in zip(blocks, own, strict=True):
            del block.forward
            if replaced is not None:
                block.forward = replaced
