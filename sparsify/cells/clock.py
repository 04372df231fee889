"""Wall seconds of named steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """What each step took, the device's queue included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[name] = time.perf_counter() - start
