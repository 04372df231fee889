"""Replaying a block's forward as a CUDA graph: one launch instead of some forty, so that small batches cost nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor | None]


class Replay:
    """A captured forward; calling it copies the input in and returns the captured output, overwritten by each call.

    Args:
        forward: runs on the device only and reads nothing that changes between calls but its argument; what it
            writes in place (running sums) is written again by every call.
        example: an input of the size to be replayed.
    """

    def __init__(self, forward: Forward, example: Tensor) -> None:
        self.input = example.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = forward(self.input)

    def __call__(self, x: Tensor) -> Tensor | None:
        self.input.copy_(x)
        self.graph.replay()
        return self.output


def captured(forward: Forward, example: Tensor) -> Replay | None:
    """A replay of `forward`, or None if something in it cannot be captured: then it is called as it is.

    Capturing runs nothing, so a failed attempt leaves no trace in running sums.
    """
    try:
        return Replay(forward, example)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None
