"""Gradients of a loss by the prunable matrices, one layer after the other: reduced and dropped as they appear.

All matrices' gradients at once are as large as the model. In the backward pass each one exists alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsify.data.inputs import Inputs, batches
from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView
from sparsify.model.objective import Loss, Objective
from sparsify.model.prunable import Layer
from sparsify.model.statistics import Accumulator, LayerStats, Needs, Statistic
from sparsify.progress import Progress, silent

Fold = Callable[[Layer, Float[Tensor, "out inp"]], None]
"""Takes a layer and its gradient, which is gone afterwards."""


@runtime_checkable
class Sums(Protocol):
    """What is kept of the gradients by one matrix."""

    def fold(self, x: Float[Tensor, "out inp"], samples: int, /) -> None:
        """Take in the gradient of the mean loss of some samples, in single precision."""


S = TypeVar("S", bound=Sums)

LARGE = 1_000_000_000
"""Prunable weights beyond which activations are computed again in the backward pass instead of being kept."""

SCALES = (1024.0, 128.0, 16.0, 2.0)
"""Factors of a half-precision loss: its gradients underflow unscaled and overflow scaled too much."""


@dataclass(frozen=True)
class Reached(Statistic):
    """Whether any sample's gradient had an entry other than zero: no expert's has that no token was routed to."""

    reads: ClassVar[Literal["input", "pair", "gradient"]] = "gradient"

    def start(self, x: Float[Tensor, "out inp"]) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=x.device)

    def fold(self, state: Any, x: Float[Tensor, "out inp"], seen: Tensor, total: Tensor) -> None:
        state.logical_or_(x.any())


REACHED = Reached()


def layer_gradients(view: BlockView, loss: Callable[[], Tensor], fold: Fold) -> None:
    """Hand the gradient of a scalar loss by every prunable matrix to `fold`, as soon as the backward pass has it.

    Args:
        view: the model; its flags, gradients and blocks are what they were when this returns or raises.
        loss: runs the model.
        fold: called once for each matrix that the loss depends on, last block first.
    """
    with ExitStack() as stack:
        stored: dict[nn.Parameter, list[Layer]] = {}
        for layer in view.layers:
            stored.setdefault(layer.stored, []).append(layer)
        for parameter, layers in stored.items():
            stack.enter_context(_folding(parameter, layers, fold))
        if view.table.numel > LARGE:
            stack.enter_context(recomputing(view.blocks))
        with torch.enable_grad():
            loss().backward(inputs=list(stored))  # type: ignore[no-untyped-call]


def gradient_statistics(
    view: BlockView, inputs: Inputs, needs: Needs, objective: Objective, progress: Progress = silent
) -> dict[str, LayerStats]:
    """Statistics of per-sample gradients of the model as it stands, by layer name.

    Each sample has a backward pass of its own, so that what is folded (a square, say) is of one sample and the size of
    a batch means nothing. A sample's loss is the mean over its predictions. What is folded is in single precision; in
    fp16 the loss is scaled for the backward pass, by a power of two and no more than the gradients allow. An expert
    that no token was routed to has a gradient of zero, and is not `seen`.

    Args:
        view: the model.
        inputs: the samples.
        needs: statistics that read a gradient.
        objective: the loss.
        progress: told after each sample.

    Raises:
        NumericsError: a gradient is not finite at any loss scale; the message names its layer.
    """
    sums = fold_gradients(view, inputs, lambda _: Accumulator(needs | {REACHED}), objective, progress=progress)
    return {x.spec.name: _finalised(x, sums.pop(x.spec.name), len(inputs)) for x in view.layers}


def fold_gradients(
    view: BlockView,
    inputs: Inputs,
    start: Callable[[Layer], S],
    objective: Objective,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> dict[str, S]:
    """Fold the gradients of the model as it stands, a backward pass for every batch; by layer name.

    What is folded is the gradient of a batch's mean loss, with the number of its samples. In fp16 the loss is scaled as
    in `gradient_statistics`.

    Args:
        view: the model.
        inputs: the samples.
        start: makes empty sums for a layer; asked again where a loss scale was too large.
        objective: the loss.
        batch_size: samples in a backward pass.
        progress: told after each batch.

    Raises:
        NumericsError: a gradient is not finite at any loss scale; the message names its layer.
    """
    half = any(layer.stored.dtype == torch.float16 for layer in view.layers)
    for scale in SCALES if half else (1.0,):
        sums = {layer.spec.name: start(layer) for layer in view.layers}
        broken = _fold_batches(view, inputs, objective, sums, scale, batch_size, progress)
        if broken is None:
            return sums
    raise NumericsError(
        f"The gradient of the loss by {broken} is not finite",
        got=f"{view.layers[0].weight.dtype}",
        fix="dtype=bfloat16 or float32" if half else "a model that is not broken: look at its perplexity",
    )


def _finalised(layer: Layer, sums: Accumulator, samples: int) -> LayerStats:
    """What was accumulated; gradients of zero where the backward pass never came by."""
    if sums.seen is None:
        sums.fold(torch.zeros_like(layer.weight, dtype=torch.float32), samples)
        return replace(sums.finalise(samples), seen=False)
    stats = sums.finalise(samples)
    # Where experts are one parameter the backward pass comes by all of them.
    return replace(stats, seen=layer.expert is None or bool(stats[REACHED]))


def _fold_batches(
    view: BlockView,
    inputs: Inputs,
    objective: Objective,
    sums: Mapping[str, Sums],
    scale: float,
    batch_size: int,
    progress: Progress,
) -> str | None:
    """Fold one batch's gradients after the other's; the name of a layer whose gradient is not finite stops it."""
    loss = objective.prepare(view.model, inputs)
    for where in batches(inputs, batch_size):
        samples = inputs.take(where)
        broken = _fold_batch(view, samples, loss, sums, scale, scale / objective.predictions(samples))
        if broken is not None:
            return broken
        progress("window", where.stop, len(inputs))
    return None


def _fold_batch(
    view: BlockView, samples: Inputs, loss: Loss, sums: Mapping[str, Sums], scale: float, factor: float
) -> str | None:
    """Fold the gradients of one batch, whose summed loss times `factor` is its mean times `scale`."""
    finite: dict[str, Tensor] = {}

    def scaled() -> Tensor:
        return loss(view.model, samples.batch(slice(0, len(samples)), view.device)) * factor

    def fold(layer: Layer, gradient: Float[Tensor, "out inp"]) -> None:
        plain = gradient.float() / scale
        finite[layer.spec.name] = torch.isfinite(plain).all()
        sums[layer.spec.name].fold(plain, len(samples))

    layer_gradients(view, scaled, fold)
    # The backward pass meets the last block first: what is wrong there has spoilt the others.
    return next((name for name, good in finite.items() if not good), None)


@contextmanager
def _folding(weight: nn.Parameter, layers: list[Layer], fold: Fold) -> Iterator[None]:
    """A weight that gives its gradient away the moment it is complete; several layers where it holds experts."""
    needed, before = weight.requires_grad, weight.grad

    def give(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        with torch.no_grad():
            for layer in layers:
                fold(layer, layer.oriented(gradient))

    weight.requires_grad_(True)
    weight.grad = None
    handle = weight.register_post_accumulate_grad_hook(give)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
        weight.grad = before
        weight.requires_grad_(needed)


@contextmanager
def recomputing(blocks: list[nn.Module]) -> Iterator[None]:
    """Blocks that keep only their inputs for the backward pass (activation checkpointing)."""
    own = [(block, block.__dict__.get("forward"), block.forward) for block in blocks]

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return recomputed

    try:
        for block, _, forward in own:
            block.forward = again(forward)
        yield
    finally:
        for block, replaced, _ in own:
            del block.forward
            if replaced is not None:
                block.forward = replaced
