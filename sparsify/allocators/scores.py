"""Wanda scores of the dense model: the one score that allocators share with a pruner."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsify.allocators.context import Context
from sparsify.model.statistics import NORM
from sparsify.pruners.wanda import wanda_scores
from sparsify.types import LayerSpec, LayerTable


def wanda_by_layer(layers: LayerTable, context: Context) -> Iterator[tuple[LayerSpec, Tensor]]:
    """|W| * ||X|| of every layer on the dense model's inputs, [out, inp], in the order of the table."""
    weights, stats = context.weights(), context.stats(frozenset({NORM}))
    for layer in layers:
        yield layer, wanda_scores(weights[layer.name], stats[layer.name].norm)


def wanda_by_block(layers: LayerTable, context: Context, reduce: Callable[[list[Tensor]], Tensor]) -> list[float]:
    """`reduce` of the Wanda scores of each block, given as a list of its matrices, first block to last."""
    values: list[Tensor] = []
    held: list[Tensor] = []
    last = {layer.block: layer.name for layer in layers}
    for layer, scores in wanda_by_layer(layers, context):
        held.append(scores)
        if layer.name == last[layer.block]:
            values.append(reduce(held))
            held = []
    return [value.item() for value in values]  # only now: each waits for its device


def mean_of(scores: list[Tensor]) -> Tensor:
    """Mean over all scores of a block, summed in double precision."""
    return torch.stack([s.sum(dtype=torch.float64) for s in scores]).sum() / sum(s.numel() for s in scores)
