"""The block walk: calibration inputs carried through the model one block at a time.

Each block is called directly, as the model itself would call it (`calls`), batch by batch; its output overwrites its
input in one activation buffer.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.data.inputs import Inputs, as_inputs, batches, check_batch_size
from sparsify.errors import UnsupportedModelError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.calls import cast, enter, forked, holds_state, run_blocks
from sparsify.model.cuda_graph import Replay, captured
from sparsify.model.experts import one_by_one
from sparsify.model.prunable import Layer
from sparsify.model.statistics import LayerStats, Needs, reading
from sparsify.model.taps import Enough, Taps


def default_batch_size(device: torch.device, length: int) -> int:
    """Samples per forward.

    One on CUDA: it is how the released code of every paper runs, in half precision the number of windows changes the
    rounding (and with it a 70% perplexity by several percent), and replayed graphs make it as fast as a batch. On
    other devices as many as make 2,048 positions (CPU) or 16,384.
    """
    if device.type == "cuda":
        return 1
    return max(1, (2_048 if device.type == "cpu" else 16_384) // length)


class Walk:
    """Hidden states of all samples, standing before block `position`.

    Args:
        view: the model's blocks.
        inputs: what is carried through them, or token ids [n, seqlen].
        batch_size: samples per forward; None picks one for the device.
        needs: statistics that will be observed. Those of pairs (`Statistic.reads`) need a second walk, of the dense
            model beside the one that is being pruned: it costs another buffer and another pass.

    Raises:
        DataError: there are no inputs.
        UsageError: they are no inputs, or the batch size is below one.
        UnsupportedModelError: blocks that, called one by one, do not give what the model gives.
    """

    def __init__(
        self,
        view: BlockView,
        inputs: Inputs | Int[Tensor, "n seq"],
        batch_size: int | None = None,
        *,
        needs: Needs = frozenset(),
    ) -> None:
        inputs = as_inputs(inputs)
        if not view.verified:
            view.verified = True
            verify(view, inputs)
        self.view = view
        size = check_batch_size(batch_size) or default_batch_size(view.device, inputs.length)
        self.batches = batches(inputs, size)
        self.hidden, self.calls = enter(view, inputs, self.batches)
        self.dense = self.hidden.clone() if reading(needs, "pair") else None
        self.dense_block = 0
        self._twin: nn.Module | None = None  # of block `dense_block`, as it is in the dense model
        self._instead: nn.Module | None = None  # called in place of any block

    def __len__(self) -> int:
        return len(self.hidden)

    def fork(self) -> "Walk":
        """Another walk that stands at the same place, with hidden states of its own."""
        other = copy.copy(self)
        other.hidden = self.hidden.clone()
        other.calls = [forked(calls) for calls in self.calls]
        return other

    @property
    def stateful(self) -> bool:
        """Whether blocks leave something for later blocks besides hidden states (keys and values, say)."""
        return any(holds_state(call) for call in self.calls[0])

    def to(self, dtype: torch.dtype) -> "Walk":
        """The same walk with hidden states and block arguments of another dtype; the blocks are left as they are."""
        self.hidden = self.hidden.to(dtype)
        self.calls = [[cast(call, dtype) for call in calls] for calls in self.calls]
        return self

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replace the hidden states by the block's outputs."""
        if self._twin is not None:
            self._advance_twin(block)
        self._pass(block, keep=True)

    @torch.no_grad()
    def observe(
        self, block: int, needs: Needs, *, only: frozenset[str] | None = None, advance: bool = False
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of the block's layers, by layer name.

        Args:
            block: index of the block; the hidden states must stand before it.
            needs: which statistics; those that read pairs need a walk that was told of them, and, the first time, the
                block as it is in the dense model.
            only: names of the layers to observe; None for all. With pairs the dense block is then kept beside the one
                that is pruned, until the walk advances.
            advance: also replace the hidden states by the outputs (saves a pass when the block stays as it is).

        Raises:
            UnsupportedModelError: a layer whose weight is read without the layer being called, or statistics of pairs
                of experts.
            UsageError: pairs in a walk, or at a time, that has none; gradients, which no walk has.
        """
        if odd := reading(needs, "gradient"):
            raise UsageError("A walk sees inputs, no gradients", got=sorted(map(repr, odd)), fix="pruner=wanda")
        layers = [x for x in self.view.layers_of(block) if only is None or x.spec.name in only]
        pairs = bool(reading(needs, "pair"))
        if pairs:
            self._check_pairs(block, layers)
        if pairs and only is not None and self._twin is None:
            self._twin = copy.deepcopy(self.view.blocks[block])
        with Taps(layers, needs, stop_early=not advance and not pairs, twins=self._twins(block, layers)) as taps:
            self._pass(block, keep=advance, taps=taps, pairs=pairs)
        self.dense_block += pairs and self._twin is None
        return taps.finalise(len(self))

    def _twins(self, block: int, layers: list[Layer]) -> dict[str, nn.Module]:
        """The modules of these layers in the dense block, where that is another one."""
        if self._twin is None:
            return {}
        names = {module: name for name, module in self.view.blocks[block].named_modules()}
        return {layer.spec.name: self._twin.get_submodule(names[layer.module]) for layer in layers}

    def _advance_twin(self, block: int) -> None:
        """Carry the dense model's states through its block."""
        assert self.dense is not None
        beside = copy.copy(self)
        beside.hidden, beside.dense, beside._instead = self.dense, None, self._twin
        beside._pass(block, keep=True)
        self._twin, self.dense_block = None, block + 1

    def _check_pairs(self, block: int, layers: list[Layer]) -> None:
        if experts := [layer.spec.name for layer in layers if layer.expert is not None]:
            raise UnsupportedModelError(
                "Statistics of pairs are not taken of experts: the dense model routes other tokens to them",
                got=experts[0],
                fix="another pruner",
            )
        if self.dense is None or self.dense_block != block:
            raise UsageError(
                "Statistics of pairs are taken from a block on before it is pruned, and not again once it is behind",
                got="a block that is pruned" if self.dense is not None else "a walk without the dense model beside it",
                allowed="one observation of a block, or one of each group of inputs before the walk advances",
            )

    @torch.no_grad()
    def shared_inputs(self, block: int) -> list[frozenset[str]]:
        """Layer names grouped by the input they share, in the order the block runs them."""
        with Taps(self.view.layers_of(block), frozenset(), stop_early=False) as taps:
            self._call(block, 0, self.hidden[self.batches[0]])
            taps.end_learning()
        return [*(frozenset(group) for group in taps.groups.values()), *taps.stacks()]

    def _pass(self, block: int, keep: bool, taps: "Taps | None" = None, pairs: bool = False) -> None:
        """All batches through the block, the first one eagerly, the others from a graph where that pays."""
        replay: Replay | None = None
        for i, where in enumerate(self.batches):
            if taps is not None:
                taps.samples = where.stop - where.start
            states = [buffer[where] for buffer in (self.hidden, self.dense if pairs else None) if buffer is not None]
            if i == 1 and self._repeats(block):
                replay = captured(self._step(block, 1, taps), *states)
            same_size = where.stop - where.start == self.batches[0].stop
            step = replay if replay and same_size else self._step(block, i, taps)
            self._keep(where, step(*states), keep)
            if i == 0 and taps is not None:
                taps.end_learning()

    def _step(self, block: int, batch: int, taps: "Taps | None") -> Callable[..., list[Tensor | None]]:
        """The block on a batch's states and, for pairs, first on the dense model's."""

        def step(hidden: Tensor, *dense: Tensor) -> list[Tensor | None]:
            if not dense or taps is None:
                return [self._call(block, batch, hidden)]
            with taps.remembering():
                beside = self._call(block, batch, dense[0], self._twin)
            return [self._call(block, batch, hidden), beside]

        return step

    def _keep(self, where: slice, outputs: list[Tensor | None], keep: bool) -> None:
        out, *beside = outputs
        if keep and out is not None:
            self.hidden[where] = out
        if beside and self.dense is not None and beside[0] is not None and self._twin is None:
            self.dense[where] = beside[0]

    @torch.no_grad()
    def call(self, block: int, batch: int, hidden: Float[Tensor, "b seq dim"]) -> Float[Tensor, "b seq dim"]:
        """The block's output for other hidden states of a batch; the walk stays where it stands."""
        out = self._call(block, batch, hidden)
        assert out is not None  # only taps make a block stop early
        return out.to(hidden.device)

    def _call(self, block: int, batch: int, hidden: Tensor, instead: nn.Module | None = None) -> Tensor | None:
        """The block's output for a batch, or another's; None if the taps had seen enough before it was done."""
        module = instead or self._instead or self.view.blocks[block]
        with one_by_one(self.view.model) if self.view.has_experts else nullcontext():
            try:
                return _first(module(hidden, **self.calls[batch][block]))
            except Enough:
                return None

    def _repeats(self, block: int) -> bool:
        """Whether the batches differ in nothing but their hidden states, and are many enough to capture one."""
        return (
            self.hidden.is_cuda
            and all(layer.weight.device == self.hidden.device for layer in self.view.layers_of(block))
            and len(self.batches) >= 8
            and all(
                calls[block] is self.calls[0][block]
                for calls, where in zip(self.calls, self.batches, strict=True)
                if where.stop - where.start == self.batches[0].stop
            )
        )


def _first(out: Any) -> Tensor:
    """The hidden states among a block's outputs: a tensor in most families, first of a tuple in some."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


@torch.no_grad()
def verify(view: BlockView, inputs: Inputs) -> None:
    """Try on a few tokens that the blocks, called one by one, give what they give in the model's own forward.

    A block may read what no argument shows (a buffer that an earlier block filled, say): numbers of a walk would then
    be wrong without a word.

    Raises:
        UnsupportedModelError: naming the first block that differs.
    """
    few = inputs.few()
    own: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: own.append(_first(out).clone())) for block in view.blocks
    ]
    try:
        for where in (slice(0, 1), slice(1, 2))[: len(few)]:
            run_blocks(view, few.batch(where, view.device))
    finally:
        for handle in handles:
            handle.remove()
    walk = Walk(view, few, 1)
    if walk.hidden.ndim != 3:
        raise _not_walked(view, 0, f"hidden states of shape {tuple(walk.hidden.shape[1:])} a sample")
    for block in range(len(view.blocks)):
        walk.advance(block)
        for sample in range(len(few)):
            there = own[sample * len(view.blocks) + block].to(walk.hidden.device)
            far = float((walk.hidden[sample : sample + 1] - there).float().abs().max() / there.float().abs().max())
            if far > (1e-3 if there.dtype == torch.float32 else 5e-2):
                raise _not_walked(view, block, f"outputs that differ by {far:.1%} of the largest")


def _not_walked(view: BlockView, block: int, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The blocks of {type(view.model).__name__}, called one by one, do not give what the model gives",
        got=f"block {block}: {got}",
        allowed="blocks that hand on hidden states [batch, positions, width] and read nothing but their arguments",
    )
