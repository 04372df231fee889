"""What pruners and allocators know of a layer: statistics that are folded batch by batch and finalised once.

A statistic is an object with `start`, `fold` and `finalise`; whoever names it in `needs` gets it. `NORM` and `GRAM` are
those of the published methods. One of your own is a frozen dataclass in the module that reads it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.errors import UsageError


class Statistic(ABC):
    """Something that is accumulated for each distinct input of a layer (or for each layer's gradient).

    Attributes:
        reads: what is folded. `input`: what enters the layer. `pair`: that and what enters it in the dense model, for
            the same tokens. `gradient`: the gradient of the dense model's loss by the layer's weight, one sample at a
            time.
    """

    reads: ClassVar[Literal["input", "pair", "gradient"]] = "input"

    @abstractmethod
    def start(self, x: Float[Tensor, "rows inp"]) -> Any:
        """An empty state on the device of `x`: a tensor, or a container of tensors."""

    @abstractmethod
    def fold(self, state: Any, x: Float[Tensor, "rows inp"], seen: Tensor, total: Tensor) -> None:
        """Add some samples to the state, in place and without asking the device for a number.

        A `pair` is folded with `dense=` the dense model's rows as well.

        Args:
            state: what `start` made.
            x: all their tokens, or a sample's gradient [out, inp]; single precision.
            seen: samples folded before, a scalar on the device.
            total: samples folded with these.
        """

    def finalise(self, state: Any) -> Any:
        """What readers get."""
        return state


@dataclass(frozen=True)
class SquaredNorm(Statistic):
    """Mean over windows of the sum over tokens of x_j^2, fp32, [inp]: Wanda's `scaler_row`.

    The arithmetic is the released code's, step by step (`WrappedGPT.add_batch`): near a tie the last bit decides which
    weight goes, and at high sparsity a few such weights move a perplexity by percents.
    """

    def start(self, x: Float[Tensor, "rows inp"]) -> Tensor:
        return torch.zeros(x.shape[1], device=x.device)

    def fold(self, state: Any, x: Float[Tensor, "rows inp"], seen: Tensor, total: Tensor) -> None:
        norms = torch.linalg.vector_norm(x.T, dim=1)
        state.mul_((seen / total).float()).add_(norms.square() * total.float().reciprocal())


@dataclass(frozen=True)
class Gram(Statistic):
    """Mean over windows of 2 X X^T, fp32, [inp, inp]: SparseGPT's H, undamped, as `SparseGPT.add_batch` adds it up."""

    def start(self, x: Float[Tensor, "rows inp"]) -> Tensor:
        return torch.zeros(x.shape[1], x.shape[1], device=x.device)

    def fold(self, state: Any, x: Float[Tensor, "rows inp"], seen: Tensor, total: Tensor) -> None:
        scaled = x * (2.0 / total).sqrt().float()
        state.mul_((seen / total).float()).add_(scaled.T @ scaled)


NORM, GRAM = SquaredNorm(), Gram()
Needs = frozenset[Statistic]


@dataclass
class LayerStats:
    """Statistics of one distinct input; layers that read the same tensor share the object.

    Attributes:
        samples: calibration samples folded in.
        values: by statistic.
        memo: derived quantities (a factorisation) computed once and shared like the object itself.
        seen: whether any token was; False for an expert that none was routed to, whose statistics are those of nothing.
    """

    samples: int
    values: Mapping[Statistic, Any] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    seen: bool = True

    def __contains__(self, statistic: Statistic) -> bool:
        return statistic in self.values

    def __getitem__(self, statistic: Statistic) -> Any:
        if statistic not in self.values:
            raise UsageError(
                "A statistic is read that was not asked for", got=statistic, fix="name it in `needs` of what reads it"
            )
        return self.values[statistic]

    @property
    def square(self) -> Float[Tensor, " inp"]:
        """`NORM` as it is accumulated."""
        square: Tensor = self[NORM]
        return square

    @property
    def norm(self) -> Float[Tensor, " inp"]:
        """||X_j||_2 as Wanda uses it: square root of `square`."""
        return self.square.sqrt()

    @property
    def gram(self) -> Float[Tensor, "inp inp"]:
        """`GRAM`."""
        gram: Tensor = self[GRAM]
        return gram

    def joined(self, gradients: "LayerStats | None") -> "LayerStats":
        """Statistics of a layer's input, shared with its neighbours, and those of its own gradient.

        Whether a token was seen is the input's to say, where one was looked at.
        """
        if gradients is None:
            return self
        seen = self.seen if self.values else gradients.seen
        return LayerStats(self.samples, {**self.values, **gradients.values}, self.memo, seen)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed the first time and remembered."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


class Accumulator:
    """The needed statistics of one input in the making.

    Counts live on the device, so that folding can be replayed as part of a CUDA graph.
    """

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.seen: Tensor | None = None
        self.states: dict[Statistic, Any] = {}

    def fold(
        self, x: Float[Tensor, "*batch inp"], samples: int, dense: Float[Tensor, "*batch inp"] | None = None
    ) -> None:
        """Add the tokens of some samples (all leading axes are tokens), in fp32 whatever the dtype of `x`.

        Args:
            x: what entered the layer.
            samples: how many samples these are.
            dense: what entered it in the dense model, for statistics of pairs.
        """
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.seen is None:
            # Double, as Python's own numbers in the released code; Apple's devices have none.
            self.seen = torch.zeros((), device=x.device, dtype=torch.float32 if x.is_mps else torch.float64)
            self.states = {statistic: statistic.start(rows) for statistic in self.needs}
        total = self.seen + samples
        for statistic, state in self.states.items():
            if statistic.reads == "pair":
                assert dense is not None
                other = dense.reshape(-1, dense.shape[-1]).float()
                statistic.fold(state, rows, self.seen, total, dense=other)  # type: ignore[call-arg]
            else:
                statistic.fold(state, rows, self.seen, total)
        self.seen.copy_(total)

    def finalise(self, samples: int) -> LayerStats:
        """What was accumulated; `samples` is the number of samples folded in."""
        return LayerStats(samples, {s: s.finalise(state) for s, state in self.states.items()})


def reading(needs: Needs, *kinds: str) -> Needs:
    """Those of the needed statistics that read one of these: `input`, `pair`, `gradient`."""
    return frozenset(statistic for statistic in needs if statistic.reads in kinds)


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
