"""The layers of a model one after the other, each with statistics of its input: what pruning and quantising walk."""

from collections.abc import Iterator
from typing import Any, Literal

from sparsify.errors import UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.prunable import Layer
from sparsify.model.statistics import LayerStats, Needs
from sparsify.model.walk import Walk
from sparsify.progress import Progress, silent

Regime = Literal["propagated", "sequential", "dense"]
REGIMES = ("propagated", "sequential", "dense")


def check_regime(regime: str) -> None:
    """Refuse a regime that there is not.

    Raises:
        UsageError: it is another word.
    """
    if regime not in REGIMES:
        raise UsageError("Unknown regime", got=regime, allowed=", ".join(REGIMES))


def observed(
    view: BlockView,
    inputs: Any,
    needs: Needs,
    regime: Regime = "propagated",
    batch_size: int | None = None,
    last: int | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[Layer, LayerStats]]:
    """Every layer with its statistics, which whoever asks may change before asking for the next one.

    Args:
        view: the model.
        inputs: what statistics are taken on, or token ids [n, seqlen].
        needs: statistics; where there are none nothing is walked.
        regime: where they come from. `propagated`: the block as it was, on inputs from the blocks before it as they are
            now. `sequential`: also from the layers of the block that came before. `dense`: the model as it was.
        batch_size: samples per forward.
        last: block after which nothing is observed any more; None for the last one.
        progress: told after each block.
    """
    total = len(view.blocks)
    last = total - 1 if last is None else last
    walk = Walk(view, inputs, batch_size, needs=needs) if needs and last >= 0 else None
    for block in range(total):
        yield from _of_block(walk if block <= last else None, view, block, needs, regime)
        if walk is not None and block < last and regime != "dense":
            walk.advance(block)
        progress("block", block + 1, total)


def _of_block(
    walk: Walk | None, view: BlockView, block: int, needs: Needs, regime: Regime
) -> Iterator[tuple[Layer, LayerStats]]:
    layers = {layer.spec.name: layer for layer in view.layers_of(block)}
    if walk is None:
        yield from ((layer, LayerStats(0)) for layer in layers.values())
    elif regime == "sequential":
        for group in walk.shared_inputs(block):
            stats = walk.observe(block, needs, only=group)
            yield from ((layers[name], stats[name]) for name in layers if name in group)
    else:
        stats = walk.observe(block, needs, advance=regime == "dense")
        yield from ((layers[name], stats[name]) for name in layers)
