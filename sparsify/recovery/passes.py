"""Forward and backward passes over the parts of a batch; on a GPU each size of them is captured as a CUDA graph."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.data.examples import PADDING, Examples
from sparsify.model.cuda_graph import Replay
from sparsify.recovery.loss import TrainingLoss

SHORTEST = 64
"""Tokens that the shortest samples are padded to; longer ones to the next power of two, so that few sizes occur."""
EAGER = 2
"""Passes of a size that run as they are before it is captured: libraries choose their kernels in them."""


class Passes:
    """Passes that replay what was captured of the same size before.

    A small model's step is ten thousand launches of some microseconds each: by hand the GPU waits for Python most of
    the time. Samples are padded to few sizes, and logits are made of padding, too, so that nothing in a pass depends on
    the text. Weights, adapters and gradients are read and written where they are: they may change between passes, as
    long as they stay in place.

    Args:
        loss: of a batch.
        parameters: that have gradients.
        device: a CUDA device.
        longest: positions that the model has, if they end somewhere.
    """

    def __init__(
        self, loss: TrainingLoss, parameters: Sequence[nn.Parameter], device: torch.device, longest: int | None
    ) -> None:
        self.loss, self.parameters, self.device, self.longest = loss, list(parameters), device, longest
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self._seen: Counter[tuple[int, int]] = Counter()
        self._replays: dict[tuple[int, int], Replay | None] = {}

    def zero(self) -> None:
        """Gradients of zero, at the place where captured passes add to them."""
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, some: Examples, rows: int, weight: Tensor) -> Float[Tensor, ""]:
        """Add the gradients of `weight` times the loss, and return the loss.

        Args:
            some: at most `rows` samples.
            rows: samples that the pass has room for.
            weight: of the loss, a scalar on the device.
        """
        ids, counted = padded(some, rows, self.room_for(some.length), self.device)
        size = ids.shape[0], ids.shape[1]
        self._seen[size] += 1
        if self._seen[size] == EAGER + 1:
            self._replays[size] = self._captured(ids, counted, weight)
        replay = self._replays.get(size)
        if replay is not None:
            loss: Tensor = replay(ids, counted, weight)
            return loss
        return self._aside(ids, counted, weight)

    def room_for(self, length: int) -> int:
        """What so many tokens are padded to: a power of two, unless the model's positions end before it."""
        room = max(SHORTEST, 2 ** math.ceil(math.log2(length)))
        return room if self.longest is None or room <= self.longest else max(length, self.longest)

    def _pass(self, ids: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = self.loss({"input_ids": ids, "use_cache": False}, counted, every=True)
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _aside(self, *inputs: Tensor) -> Tensor:
        """A pass on a stream that is not the default one, where what is captured later has to have been first."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self._pass(*inputs)
        current.wait_stream(self.stream)
        return loss

    def _captured(self, *inputs: Tensor) -> Replay | None:
        try:
            return Replay(self._pass, *inputs, pool=self.pool)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            reason = str(error).splitlines()[0]
            warnings.warn(f"Training steps cannot be captured as CUDA graphs, and are slower: {reason}", stacklevel=2)
            return None


def padded(
    some: Examples, rows: int, length: int, device: torch.device
) -> tuple[Int[Tensor, "rows len"], Bool[Tensor, "rows len"]]:
    """Token ids of a batch of that size, and which of them count."""
    whole, missing = slice(0, len(some)), (0, length - some.length, 0, rows - len(some))
    ids, counted = some.batch(whole, device)["input_ids"], some.counted(whole, device)
    return F.pad(ids, missing, value=PADDING), F.pad(counted, missing, value=False)
