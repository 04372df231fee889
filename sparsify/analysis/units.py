"""What is ranked by sensitivity: blocks or single matrices, and numbers of matrices summed up for them."""

from collections.abc import Mapping
from typing import Literal

from sparsify.errors import UsageError
from sparsify.types import LayerTable

Groups = Literal["block", "layer"]
Measure = Literal["sum", "mean"]


def check_groups(groups: str) -> None:
    """Refuse what is neither blocks nor matrices.

    Raises:
        UsageError: something else.
    """
    if groups not in ("block", "layer"):
        raise UsageError("Unknown groups", got=groups, allowed="block, layer")


def check_measure(measure: str) -> None:
    """Refuse what is neither a sum over weights nor a mean per weight.

    Raises:
        UsageError: something else.
    """
    if measure not in ("sum", "mean"):
        raise UsageError("Unknown measure", got=measure, allowed="sum (over all weights), mean (per weight)")


def units(layers: LayerTable, groups: Groups = "block") -> list[list[str]]:
    """Names of the matrices of each unit: of every block, first to last, or every matrix alone."""
    if groups == "layer":
        return [[layer.name] for layer in layers]
    blocks: dict[int, list[str]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer.name)
    return [blocks[block] for block in sorted(blocks)]


def aggregated(
    sums: Mapping[str, float], layers: LayerTable, groups: Groups = "block", measure: Measure = "sum"
) -> list[float]:
    """Sums over weights, by layer name, added up for every unit; divided by its weights for `mean`."""
    numel = {layer.name: layer.numel for layer in layers}
    totals = [(sum(sums[name] for name in unit), sum(numel[name] for name in unit)) for unit in units(layers, groups)]
    return [total / weights if measure == "mean" else total for total, weights in totals]
