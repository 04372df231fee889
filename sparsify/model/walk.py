"""The block walk: calibration inputs carried through the model one block at a time.

Each block is called directly, as the model itself would call it (`calls`), batch by batch; its output overwrites its
input in one activation buffer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.data.inputs import Inputs, as_inputs, batches, check_batch_size
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView, Layer
from sparsify.model.calls import cast, enter
from sparsify.model.cuda_graph import Replay, captured
from sparsify.model.statistics import Accumulator, LayerStats, Needs, reading


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
        self.view = view
        size = check_batch_size(batch_size) or default_batch_size(view.device, inputs.length)
        self.batches = batches(inputs, size)
        self.hidden, self.calls = enter(view, inputs, self.batches)
        self.dense = self.hidden.clone() if reading(needs, "pair") else None
        self.dense_block = 0

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, dtype: torch.dtype) -> "Walk":
        """The same walk with hidden states and block arguments of another dtype; the blocks are left as they are."""
        self.hidden = self.hidden.to(dtype)
        self.calls = [[cast(call, dtype) for call in calls] for calls in self.calls]
        return self

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replace the hidden states by the block's outputs."""
        self._pass(block, keep=True)

    @torch.no_grad()
    def observe(
        self, block: int, needs: Needs, *, only: frozenset[str] | None = None, advance: bool = False
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of the block's layers, by layer name.

        Args:
            block: index of the block; the hidden states must stand before it.
            needs: which statistics; those that read pairs need the block as it is in the dense model, and a walk that
                was told of them.
            only: names of the layers to observe; None for all.
            advance: also replace the hidden states by the outputs (saves a pass when the block stays as it is).

        Raises:
            NumericsError: an observed layer saw no token.
            UsageError: pairs in a walk, or at a time, that has none.
        """
        layers = [x for x in self.view.layers_of(block) if only is None or x.spec.name in only]
        pairs = bool(reading(needs, "pair"))
        if pairs:
            self._check_pairs(block)
        with _Taps(layers, needs, stop_early=not advance and not pairs) as taps:
            self._pass(block, keep=advance, taps=taps, pairs=pairs)
        self.dense_block += pairs
        return taps.finalise(len(self))

    def _check_pairs(self, block: int) -> None:
        if self.dense is None or self.dense_block != block:
            raise UsageError(
                "Statistics of pairs are taken once a block, before it is pruned",
                got="another regime" if self.dense is not None else "a walk without the dense model beside it",
                allowed="method.regime=propagated",
            )

    @torch.no_grad()
    def shared_inputs(self, block: int) -> list[frozenset[str]]:
        """Layer names grouped by the input they share, in the order the block runs them."""
        with _Taps(self.view.layers_of(block), frozenset(), stop_early=False) as taps:
            self._call(block, 0, self.hidden[self.batches[0]])
            taps.end_learning()
        return [frozenset(group) for group in taps.groups.values()]

    def _pass(self, block: int, keep: bool, taps: "_Taps | None" = None, pairs: bool = False) -> None:
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

    def _step(self, block: int, batch: int, taps: "_Taps | None") -> Callable[..., list[Tensor | None]]:
        """The block on a batch's states and, for pairs, first on the dense model's."""

        def step(hidden: Tensor, *dense: Tensor) -> list[Tensor | None]:
            if not dense or taps is None:
                return [self._call(block, batch, hidden)]
            with taps.remembering():
                beside = self._call(block, batch, dense[0])
            return [self._call(block, batch, hidden), beside]

        return step

    def _keep(self, where: slice, outputs: list[Tensor | None], keep: bool) -> None:
        out, *beside = outputs
        if keep and out is not None:
            self.hidden[where] = out
        if beside and self.dense is not None and beside[0] is not None:
            self.dense[where] = beside[0]

    @torch.no_grad()
    def call(self, block: int, batch: int, hidden: Float[Tensor, "b seq dim"]) -> Float[Tensor, "b seq dim"]:
        """The block's output for other hidden states of a batch; the walk stays where it stands."""
        out = self._call(block, batch, hidden)
        assert out is not None  # only taps make a block stop early
        return out.to(hidden.device)

    def _call(self, block: int, batch: int, hidden: Tensor) -> Tensor | None:
        """The block's output for a batch; None if the taps had seen enough before it was done."""
        try:
            return _first(self.view.blocks[block](hidden, **self.calls[batch][block]))
        except _Enough:
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


class _Enough(Exception):
    """Raised inside a block once its last observed input has been seen."""


class _Taps:
    """Pre-hooks that fold each distinct layer input once; always removed, whatever happens inside."""

    def __init__(self, layers: list[Layer], needs: Needs, stop_early: bool) -> None:
        self.layers = layers
        self.needs = reading(needs, "input", "pair")
        self.stop_early = stop_early
        self.groups: dict[str, list[str]] = {}
        self.sums: dict[str, Accumulator] = {}
        self.held: dict[Any, tuple[str, Tensor]] = {}
        self.dense: dict[str, Tensor] | None = None
        self.learning = True
        self.samples = 1
        self._beside = False

    def __enter__(self) -> "_Taps":
        self.handles = {
            x.spec.name: x.module.register_forward_pre_hook(self._tap(x.spec.name), with_kwargs=True)
            for x in self.layers
        }
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles.values():
            handle.remove()
        self.held.clear()
        self.dense = None

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While this is open, what enters the layers is kept as the dense model's and not folded."""
        self.dense, self._beside = {}, True
        try:
            yield
        finally:
            self._beside = False

    def _tap(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._beside:
                assert self.dense is not None
                self.dense[name] = x
                return
            if self.learning and not self._leads(name, x):
                return
            self.sums[name].fold(x, self.samples, self.dense[name] if self.dense is not None else None)
            if self.stop_early and not self.learning and name == next(reversed(self.groups)):
                raise _Enough

        return hook

    def _leads(self, name: str, x: Tensor) -> bool:
        """Whether `name` is the first layer to read this very tensor (held, so its address is not reused)."""
        key = (x.data_ptr(), x.shape, x.stride())
        leader, _ = self.held.setdefault(key, (name, x))
        self.groups.setdefault(leader, []).append(name)
        self.sums.setdefault(leader, Accumulator(self.needs))
        return leader == name

    def end_learning(self) -> None:
        """After the first batch only the first reader of each input keeps its hook."""
        for name in set(self.handles) - set(self.groups):
            self.handles.pop(name).remove()
        self.held.clear()
        self.learning = False

    def finalise(self, samples: int) -> dict[str, LayerStats]:
        stats: dict[str, LayerStats] = {}
        for leader, names in self.groups.items():
            stats.update(dict.fromkeys(names, self.sums[leader].finalise(samples)))
        for layer in self.layers:
            if layer.spec.name not in stats:
                raise NumericsError(
                    f"Layer {layer.spec.name} saw no calibration token", fix="use more calibration windows"
                )
        return stats
