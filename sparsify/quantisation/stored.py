"""Grids in a safetensors file, beside the weights that lie on them: from both the codes are known."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparsify.quantisation.grid import Grid, Precision

GRID = "grid/"
"""How the names of what is stored of grids begin."""


def tensors_of(grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    """Three tensors a layer, `grid/<layer>/<part>`.

    `scale` and `zero` are as `Grid` has them, [out, groups]; `precision` is bits, inputs of a group (0 for the row) and
    whether the grid is symmetric.
    """
    named = dict[str, Tensor]()
    for layer, grid in grids.items():
        precision = [grid.precision.bits, grid.precision.group or 0, int(grid.precision.symmetric)]
        parts = {"scale": grid.scale, "zero": grid.zero, "precision": torch.tensor(precision)}
        named |= {f"{GRID}{layer}/{part}": tensor.contiguous() for part, tensor in parts.items()}
    return named


def grids_in(file: Path) -> dict[str, Grid]:
    """The grids of a file, by layer name; none where it has none."""
    parts = defaultdict[str, dict[str, Tensor]](dict)
    with safe_open(file, "pt") as stored:
        for name in (name for name in stored.keys() if name.startswith(GRID)):  # noqa: SIM118 (it is no dict)
            layer, _, part = name.removeprefix(GRID).rpartition("/")
            parts[layer][part] = stored.get_tensor(name)
    return {layer: _grid(found) for layer, found in parts.items()}


def _grid(parts: Mapping[str, Tensor]) -> Grid:
    bits, group, symmetric = parts["precision"].tolist()
    return Grid(Precision(bits, group or None, bool(symmetric)), parts["scale"], parts["zero"])
