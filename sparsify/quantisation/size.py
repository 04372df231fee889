"""What a sparse and quantised model takes, in bits a weight. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.types import LayerTable

HALF = 16
"""Bits of a weight of the dense model in half precision, and of a scale."""


@dataclass(frozen=True)
class Stored:
    """How a matrix is stored.

    Attributes:
        kept: weights that have a code; None for a matrix without a mask, whose weights all have one.
        bits: of a code.
        groups: scales of the matrix.
        zero_points: whether each of them has a zero point, which is a code.
    """

    kept: int | None
    bits: int
    groups: int
    zero_points: bool


def sizes(layers: LayerTable, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Bits a weight over all prunable matrices: mask, codes, scales and zero points, and their sum.

    A masked matrix takes one bit a weight for the mask and a code for every kept weight; 16 bits for the scale of every
    group of a row, and a code for its zero point if it has one. Embeddings, norms and head are not counted. A mask of
    N:M takes fewer bits than one; the one is counted, as for any other mask.
    """
    of = {layer.name: stored[layer.name] for layer in layers}
    mask = sum(layer.numel for layer in layers if of[layer.name].kept is not None)
    codes = sum(_codes(of[layer.name], layer.numel) * of[layer.name].bits for layer in layers)
    grid = sum(x.groups * (HALF + x.bits * x.zero_points) for x in of.values())
    whole = mask + codes + grid
    return {
        "mask_bits": mask / layers.numel,
        "code_bits": codes / layers.numel,
        "grid_bits": grid / layers.numel,
        "bits_per_weight": whole / layers.numel,
        "bytes": -(-whole // 8),
        "bytes_dense": 2 * layers.numel,
    }


def _codes(stored: Stored, numel: int) -> int:
    return numel if stored.kept is None else stored.kept
