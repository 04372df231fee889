"""Replaying a forward as a CUDA graph: one launch instead of hundreds, so that many small steps cost nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Replay:
    """A captured forward; calling it copies the inputs in and returns the captured output, overwritten by each call.

    Args:
        forward: runs on the device only and reads nothing that changes between calls but its arguments; what it
            writes in place (running sums, its own arguments' copies) is written again by every call.
        examples: inputs of the sizes to be replayed.
        pool: of memory, shared by graphs that are replayed one after the other.
    """

    def __init__(self, forward: Callable[..., Any], *examples: Tensor, pool: Any = None) -> None:
        self.inputs = [example.clone() for example in examples]
        self.device = examples[0].device
        self.graph = torch.cuda.CUDAGraph()
        # The default stream is that of the first device ever captured on.
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.output = forward(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.output


def captured(forward: Callable[..., Any], *examples: Tensor) -> Replay | None:
    """A replay of `forward`, or None if something in it cannot be captured: then it is called as it is.

    Capturing runs nothing, so a failed attempt leaves no trace in running sums.
    """
    try:
        return Replay(forward, *examples)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None
