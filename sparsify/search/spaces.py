"""What a search may vary: points in a box, and the profile of sparsities that each of them means. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsify.types import LayerTable

Profile = dict[str, float]


@dataclass(frozen=True)
class Space:
    """A box of points with a meaning.

    Attributes:
        starts: points to try first, [k, dim].
        low: lower bound of every coordinate, [dim].
        high: upper bound, [dim].
        moves: steps of a natural size that a local search combines, [m, dim].
        profile: the sparsity by layer name that a point asks for, before the budget is met.
        grid: points of a grid search, [g, dim]; None where a grid makes no sense.
    """

    starts: Float[ndarray, "k dim"]
    low: Float[ndarray, " dim"]
    high: Float[ndarray, " dim"]
    moves: Float[ndarray, "m dim"]
    profile: Callable[[Float[ndarray, " dim"]], Profile]
    grid: Float[ndarray, "g dim"] | None = None

    @property
    def dim(self) -> int:
        return len(self.low)


def progressions(layers: LayerTable, sparsity: float, limit: float, grid: Sequence[float]) -> Space:
    """ATP's one-parameter family: the common difference beta between neighbouring blocks, in [0, limit]."""
    depth = np.arange(layers.num_blocks) - (layers.num_blocks - 1) / 2

    def profile(point: Float[ndarray, " dim"]) -> Profile:
        return layers.spread((sparsity + float(point[0]) * depth).tolist())

    one = np.ones((1, 1))
    return Space(0 * one, np.zeros(1), np.full(1, limit), one * limit / 4, profile, np.asarray(grid)[:, None])


def groups(layers: LayerTable, by: str, starts: Sequence[Mapping[str, float]], reach: float) -> Space:
    """One sparsity per block (`by="block"`) or per matrix (`"layer"`), within `reach` of the start's mean."""
    names = [layer.name for layer in layers]
    blocks = sorted({layer.block for layer in layers})
    owner = np.array([blocks.index(x.block) if by == "block" else i for i, x in enumerate(layers)])
    weights = np.array([layer.numel for layer in layers], dtype=float)
    sizes = np.bincount(owner, weights)

    def point(start: Mapping[str, float]) -> Float[ndarray, " dim"]:
        return np.bincount(owner, weights * np.array([start[name] for name in names])) / sizes

    def profile(x: Float[ndarray, " dim"]) -> Profile:
        return dict(zip(names, x[owner].tolist(), strict=True))

    points = np.stack([point(start) for start in starts])
    centre = float((points[0] * sizes).sum() / sizes.sum())
    low, high = max(centre - reach, 0.0), min(centre + reach, 0.99)
    moves = _moves(layers, owner, len(sizes))
    return Space(points, np.full(len(sizes), low), np.full(len(sizes), high), moves, profile)


def _moves(layers: LayerTable, owner: Int[ndarray, " layers"], dim: int) -> Float[ndarray, "m dim"]:
    """Single groups, whole blocks, all matrices of a kind, and smooth waves over depth (of all or of one kind)."""
    block = np.array([layer.block for layer in layers])
    kind = np.array([layer.kind for layer in layers])
    depth = (block + 0.5) / (block.max() + 1)
    waves = [np.cos(math.pi * f * depth) for f in (1, 2, 3)]
    rows = [(block == b).astype(float) for b in sorted(set(block))] + waves
    if dim == len(block):
        of_kind = [(kind == k).astype(float) for k in sorted(set(kind))]
        rows += of_kind + [mask * waves[0] for mask in of_kind]
    moved = [np.bincount(owner, row) / np.bincount(owner) for row in rows]
    return 0.03 * np.concatenate([np.eye(dim), np.stack(moved)])


def blends(profiles: Sequence[Mapping[str, float]], sparsity: float, reach: float = 1.5) -> Space:
    """Weights of a sum of centred profiles: S + sum_k w_k (p_k - S), each weight in [-reach, reach]."""
    names = list(profiles[0])
    centred = np.array([[profile[name] - sparsity for name in names] for profile in profiles])

    def profile(weights: Float[ndarray, " dim"]) -> Profile:
        return dict(zip(names, (sparsity + weights @ centred).tolist(), strict=True))

    dim = len(profiles)
    starts = np.concatenate([np.eye(dim), np.full((1, dim), 1 / dim), np.zeros((1, dim))])
    return Space(starts, np.full(dim, -reach), np.full(dim, reach), 0.3 * np.eye(dim), profile)
