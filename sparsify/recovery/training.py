"""The training loop of adapters and of surviving weights, on one process or, by accelerate, on several."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsify.data.examples import Examples
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import LARGE, recomputing
from sparsify.progress import Progress, silent
from sparsify.recovery.loss import TrainingLoss
from sparsify.recovery.passes import Passes
from sparsify.recovery.schedule import Schedule

GROUPED = 50
"""Batches whose samples are sorted by length together, as transformers' `group_by_length` does."""


class Trainer:
    """An optimiser of some parameters of a model, somewhere in its schedule.

    With several processes (`accelerate launch`) each has the whole model, takes its share of every batch, and gradients
    are averaged: losses and weights are those of one process, up to the order of sums.

    Args:
        view: the model; modules are in train mode while it runs, and as they were afterwards.
        parameters: what is trained, in single precision.
        schedule: how.
        total: steps of the whole schedule.
        dense: a copy of the dense model, for `schedule.distill`.
        after: called after every step of the optimiser.
    """

    def __init__(
        self,
        view: BlockView,
        parameters: Sequence[nn.Parameter],
        schedule: Schedule,
        total: int,
        *,
        dense: nn.Module | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.view, self.parameters, self.schedule, self.after = view, list(parameters), schedule, after
        self.restart(total)
        half = any(layer.stored.dtype == torch.float16 for layer in view.layers)
        self.scaler = torch.amp.GradScaler(view.device.type, enabled=half)
        self.accelerator = Accelerator(cpu=view.device.type == "cpu")
        if schedule.batch % self.accelerator.num_processes:
            raise UsageError(
                "Every process takes an equal share of a batch",
                got=f"batch={schedule.batch}, {self.accelerator.num_processes} processes",
                fix=f"schedule.batch={self.accelerator.num_processes * 4}",
            )
        self.loss = TrainingLoss(view.model, dense, schedule.distill)
        self.passes = self._passes() if replays(view) and self.accelerator.num_processes == 1 else None

    def restart(self, total: int) -> None:
        """A new optimiser at the first of so many steps; the parameters stay."""
        rate, decay, fused = self.schedule.rate, self.schedule.decay, self.view.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay, fused=fused)
        self.step, self.total = 0, total

    def _passes(self) -> Passes:
        longest = getattr(self.view.model.config, "max_position_embeddings", None)
        return Passes(self.loss, self.parameters, self.view.device, longest)

    def run(self, examples: Examples, seed: int, progress: Progress = silent) -> list[float]:
        """Train on all examples, `schedule.epochs` times.

        Args:
            examples: what is predicted.
            seed: of their order and of dropout.
            progress: told of every step.

        Returns:
            What was lowered, in nats per predicted token, by step of the optimiser.

        Raises:
            NumericsError: the loss is not finite: the message has the step and its learning rate, and the
                parameters are as they were before it.
        """
        self.loss.find_head(examples.probe(self.view.device))
        torch.manual_seed(seed)
        order = [chosen for epoch in range(self.schedule.epochs) for chosen in self._order(examples, seed, epoch)]
        losses = []
        with _training(self.view, self.parameters):
            module = self.accelerator.prepare_model(self.loss, device_placement=False)
            for count, chosen in enumerate(order, start=1):
                losses.append(self._step(module, examples, chosen))
                progress("training", count, len(order))
        return losses

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters themselves."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be as at `state_dict`."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _order(self, examples: Examples, seed: int, epoch: int) -> list[list[int]]:
        """Batches of samples of like length, in a random order."""
        generator = torch.Generator().manual_seed(seed + epoch)
        drawn = torch.randperm(len(examples), generator=generator).tolist()
        size = self.schedule.batch
        groups = [drawn[i : i + GROUPED * size] for i in range(0, len(drawn), GROUPED * size)]
        sorted_ = [i for group in groups for i in sorted(group, key=lambda i: -len(examples.ids[i]))]
        return [sorted_[i : i + size] for i in range(0, len(sorted_), size)]

    def _step(self, module: nn.Module, examples: Examples, chosen: list[int]) -> float:
        """One step of the optimiser; the loss before it."""
        total = sum(len(examples.ids[i]) - examples.starts[i] for i in chosen)
        rate = self.schedule.rate * self.schedule.factor(self.step, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        lowered = self._backward(module, examples, chosen, total)
        if not math.isfinite(lowered):
            raise NumericsError(
                "The loss of a training step is not finite",
                got=f"{lowered} at step {self.step + 1} of {self.total}, learning rate {rate:g}",
                fix="a lower schedule.rate, or dtype=bfloat16 or float32 if this is float16",
            )
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.after()
        self.step += 1
        return lowered

    def _backward(self, module: nn.Module, examples: Examples, chosen: list[int], total: int) -> float:
        """Gradients of the mean over all predicted tokens of the batch, part by part; returns that mean."""
        if self.passes is not None:
            return self._replayed(self.passes, examples, chosen, total)
        processes = self.accelerator.num_processes
        mine = chosen[self.accelerator.process_index :: processes]
        parts = list(self._parts(examples, mine or chosen[:1]))
        lowered = torch.zeros((), dtype=torch.float64, device=self.view.device)
        for number, part in enumerate(parts, start=1):
            some = examples.take(part)
            where = slice(0, len(part))
            counted = some.counted(where, self.view.device) & bool(mine)  # nothing of a sample that is another's
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(module):
                loss = module(some.batch(where, self.view.device), counted)
                self.accelerator.backward(self.scaler.scale(loss * (processes / total)))
            lowered += loss.detach() / total
        gathered: Tensor = self.accelerator.reduce(lowered, "sum")
        return float(gathered)

    def _replayed(self, passes: Passes, examples: Examples, chosen: list[int], total: int) -> float:
        """The same by passes of few sizes."""
        passes.zero()
        weight = self.scaler.scale(torch.tensor(1 / total, device=self.view.device))
        rows = min(self._rows(passes.room_for(examples.take(chosen).length)), self.schedule.batch)
        parts = [examples.take(chosen[i : i + rows]) for i in range(0, len(chosen), rows)]
        return float(sum(passes(part, rows, weight).double() for part in parts)) / total

    def _parts(self, examples: Examples, mine: list[int]) -> Iterator[list[int]]:
        size = self._rows(max(len(examples.ids[i]) for i in mine))
        yield from (mine[i : i + size] for i in range(0, len(mine), size))

    def _rows(self, longest: int) -> int:
        """Samples of one forward."""
        return self.schedule.micro or max(1, (2048 if self.view.device.type == "cpu" else 8192) // longest)


def replays(view: BlockView) -> bool:
    """Whether passes through this model may be captured: it is on one GPU, and recomputes nothing."""
    devices = {parameter.device for parameter in view.model.parameters()}
    return view.device.type == "cuda" and len(devices) == 1 and view.table.numel <= LARGE


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """What the accelerator held at most since the block began, in GiB, as a note for the record; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield lambda: {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


@contextmanager
def _training(view: BlockView, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Train mode, gradients of these parameters alone, and activations computed again where the model is large."""
    modes = {module: module.training for module in view.model.modules()}
    trained = set(map(id, parameters))
    frozen = [p for p in view.model.parameters() if p.requires_grad and id(p) not in trained]
    view.model.train()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), recomputing(view.blocks) if view.table.numel > LARGE else nullcontext():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
