"""Statistics of a layer's input over the calibration text: fold batches in, finalise once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NEEDS = frozenset({"norm", "gram"})
"""What a pruner or allocator may ask for."""


@dataclass
class LayerStats:
    """Statistics of one distinct input; layers that read the same tensor share the object.

    Attributes:
        samples: calibration windows folded in.
        square: mean over windows of the sum over tokens of x_j^2 (Wanda's `scaler_row`), fp32, [inp].
        gram: mean over windows of 2 X X^T (SparseGPT's H, undamped), fp32, [inp, inp].
        memo: derived quantities (a factorisation) computed once and shared like the object itself.
    """

    samples: int
    square: Float[Tensor, " inp"] | None = None
    gram: Float[Tensor, "inp inp"] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed the first time and remembered."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    @property
    def norm(self) -> Float[Tensor, " inp"]:
        """||X_j||_2 as Wanda uses it: square root of `square`."""
        if self.square is None:
            raise LookupError("these statistics were collected without 'norm'")
        return self.square.sqrt()


class Accumulator:
    """Running sums of the needed statistics of one input."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs
        self.square: Tensor | None = None
        self.gram: Tensor | None = None

    def fold(self, x: Float[Tensor, "*batch inp"]) -> None:
        """Add the rows of `x` (all leading axes are tokens), in fp32 whatever the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        if "gram" in self.needs:
            self.gram = _add(self.gram, gram_of(rows))
        if "norm" in self.needs:
            self.square = _add(
                self.square,
                rows.float().square_().sum(dim=0)
                if rows.dtype != torch.float32
                else torch.linalg.vecdot(rows, rows, dim=0),
            )

    def finalise(self, samples: int) -> LayerStats:
        """Means over `samples` windows."""
        square = None if self.square is None else self.square / samples
        gram = None if self.gram is None else self.gram.mul_(2.0 / samples)
        return LayerStats(samples, square, gram)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def gram_of(rows: Float[Tensor, "tok inp"]) -> Float[Tensor, "inp inp"]:
    """X^T X in fp32. Half-precision inputs on CUDA use tensor cores: the products are exact, the sums fp32."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows.T, rows, out_dtype=torch.float32)
    wide = rows.float()
    return wide.T @ wide
