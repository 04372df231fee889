"""How training goes: rate, length, batches, what is lowered. No torch."""

import math
from dataclasses import dataclass
from typing import Literal

from sparsify.errors import UsageError
from sparsify.types import check_whole


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings of a training run; the defaults are those of LoSA's release.

    Source: LoSA's `main.py`: AdamW (paged, 8 bits a moment; ours keeps 32), rate 2e-4, decay 1e-3, gradients clipped at
    0.3, one epoch, 30% of the steps to warm up, then linearly to zero, all of it anew for every step of the method:
    `configs/schedule/released.yaml`. `cosine.yaml` is a usual one instead.

    Attributes:
        rate: highest learning rate.
        shape: of its fall after the warm-up, to zero: `linear` or `cosine`.
        warmup: share of the steps in which it rises from zero.
        restart: whether a method of several steps begins a new schedule and a new optimiser with each of them.
        epochs: passes over the text.
        batch: samples of an optimiser's step.
        micro: samples of a forward pass; None for as many as make 8,192 positions (2,048 on a CPU).
        decay: of AdamW.
        clip: norm of the gradient beyond which it is scaled down.
        dropout: on the adapters' input.
        distill: share of the loss that is the divergence KL(dense || model) of the next-token distributions instead of
            the text's own cross-entropy; above zero a dense copy of the model stays in memory.
    """

    rate: float = 2e-4
    shape: Literal["linear", "cosine"] = "linear"
    warmup: float = 0.3
    restart: bool = True
    epochs: int = 1
    batch: int = 8
    micro: int | None = None
    decay: float = 1e-3
    clip: float = 0.3
    dropout: float = 0.1
    distill: float = 0.0
    version: int = 1

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise UsageError("Unknown shape of the schedule", got=self.shape, allowed="linear, cosine")
        check_whole("epochs", self.epochs)
        check_whole("batch", self.batch)
        check_whole("micro", self.micro, or_null=True)
        if not 0 < self.rate < math.inf or not self.clip > 0 or not 0 <= self.decay < math.inf:
            raise UsageError(
                "The optimiser's settings are out of range",
                got=f"rate={self.rate}, clip={self.clip}, decay={self.decay}",
                allowed="rate and clip above 0, decay at least 0",
            )
        for name in ("warmup", "dropout", "distill"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "dropout" and value == 1):
                raise UsageError(f"{name} is a share", got=value, allowed=f"0 <= {name} <= 1")

    def steps(self, samples: int) -> int:
        """Steps of the optimiser for so many samples."""
        return self.epochs * math.ceil(samples / self.batch)

    def factor(self, step: int, total: int) -> float:
        """Share of the highest rate at a step, counted from zero, as transformers' schedulers have it."""
        rising = math.ceil(self.warmup * total)
        if step < rising:
            return step / rising
        done = (step - rising) / max(total - rising, 1)
        return 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
