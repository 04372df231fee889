"""Statistics of a layer's input over the calibration text: fold batches in, finalise once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Running means of the needed statistics of one input.

    The arithmetic is the released code's, step by step (`WrappedGPT.add_batch`, `SparseGPT.add_batch`): near a tie the
    last bit decides which weight goes, and at high sparsity a few such weights move a perplexity by percents. Counts
    live on the device, so that folding can be replayed as part of a CUDA graph.
    """

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs
        self.seen: Tensor | None = None
        self.square: Tensor | None = None
        self.gram: Tensor | None = None

    def fold(self, x: Float[Tensor, "*batch inp"], windows: int) -> None:
        """Add the tokens of some windows (all leading axes are tokens), in fp32 whatever the dtype of `x`."""
        if self.seen is None:
            self._start(x)
        assert self.seen is not None
        total = self.seen + windows
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.square is not None:
            norms = torch.linalg.vector_norm(rows.T, dim=1)
            self.square.mul_((self.seen / total).float()).add_(norms.square() * total.float().reciprocal())
        if self.gram is not None:
            scaled = rows * (2.0 / total).sqrt().float()
            self.gram.mul_((self.seen / total).float()).add_(scaled.T @ scaled)
        self.seen.copy_(total)

    def _start(self, x: Float[Tensor, "*batch inp"]) -> None:
        inputs = x.shape[-1]
        # Double, as Python's own numbers in the released code; Apple's devices have none.
        self.seen = torch.zeros((), device=x.device, dtype=torch.float32 if x.is_mps else torch.float64)
        if "norm" in self.needs:
            self.square = torch.zeros(inputs, device=x.device)
        if "gram" in self.needs:
            self.gram = torch.zeros(inputs, inputs, device=x.device)

    def finalise(self, samples: int) -> LayerStats:
        """The means so far; `samples` is the number of windows folded in."""
        return LayerStats(samples, self.square, self.gram)


@contextmanager
def full_precision() -> Iterator[None]:
    """Single-precision products in single precision: no TF32 in Gram matrices and updates, whatever the user set.

    The released SparseGPT switches it off too (`torch.backends.cuda.matmul.allow_tf32 = False`).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
