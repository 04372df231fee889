"""Hooks on the layers of a block that fold what enters them into statistics."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import UnsupportedModelError
from sparsify.model.experts import Routed
from sparsify.model.prunable import Layer
from sparsify.model.statistics import Accumulator, LayerStats, Needs, reading


class Enough(Exception):
    """Raised inside a block once its last observed input has been seen."""


class Taps:
    """Pre-hooks that fold each distinct layer input once; always removed, whatever happens inside.

    Args:
        layers: what is observed.
        needs: statistics.
        stop_early: leave the block behind the last observed input.
        twins: by layer name, modules of the dense block whose inputs are remembered; none where it is the same block.
    """

    def __init__(
        self, layers: list[Layer], needs: Needs, stop_early: bool, twins: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.layers, self.twins = layers, twins or {}
        self.experts = [layer for layer in layers if layer.expert is not None]
        self.needs = reading(needs, "input", "pair")
        self.stop_early = stop_early and not self.experts  # which expert is the last is the router's to say
        self.groups: dict[str, list[str]] = {}
        self.sums: dict[str, Accumulator] = {}
        self.held: dict[Any, tuple[str, Tensor]] = {}
        self.dense: dict[str, Tensor] | None = None
        self.learning = True
        self.samples = 1
        self._beside = False

    def __enter__(self) -> "Taps":
        self.handles = {
            x.spec.name: x.module.register_forward_pre_hook(self._tap(x.spec.name), with_kwargs=True)
            for x in self.layers
            if x.expert is None
        }
        self.beside = [x.register_forward_pre_hook(self._tap(name), with_kwargs=True) for name, x in self.twins.items()]
        self.routed = ExitStack()
        if self.experts:
            self.routed.enter_context(Routed(self.experts, self._tap_expert))
        return self

    def __exit__(self, *_: object) -> None:
        self.routed.close()
        for handle in [*self.handles.values(), *self.beside]:
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
                raise Enough

        return hook

    def _tap_expert(self, name: str, x: Tensor) -> None:
        """Every expert has tokens of its own, and none in some batches."""
        self.sums.setdefault(name, Accumulator(self.needs)).fold(x, self.samples)

    def stacks(self) -> list[frozenset[str]]:
        """The experts that share a parameter, in the order of the parameters."""
        names: dict[str, list[str]] = {}
        for layer in self.experts:
            names.setdefault(layer.stored_name, []).append(layer.spec.name)
        return [frozenset(group) for group in names.values()]

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
        some = set(stats) | set(self.sums)
        for layer in self.layers:
            name = layer.spec.name
            if name in self.sums and name not in stats:
                stats[name] = self.sums[name].finalise(samples)
            elif name not in stats:
                stats[name] = self._of_nothing(layer, some)
        return stats

    def _of_nothing(self, layer: Layer, some: set[str]) -> LayerStats:
        """Statistics of an expert that no token was routed to: zeros, of no samples.

        Raises:
            UnsupportedModelError: it is no expert, or none of all experts was seen.
        """
        siblings = {name for name in some if _stem(name) == _stem(layer.spec.name)} - {layer.spec.name}
        if not siblings:
            raise UnsupportedModelError(
                "The weight of this layer is read without the layer being called, so its input is not known",
                got=layer.spec.name,
                allowed="layers that the block calls",
                fix="pruner=magnitude, which reads no inputs",
            )
        sums = Accumulator(self.needs)
        sums.fold(torch.zeros(0, layer.spec.in_features, device=layer.weight.device), 1)  # no tokens
        return replace(sums.finalise(0), seen=False)


def _stem(name: str) -> str:
    """A layer's name without its numbers: the same for the experts of a block (and for no other layers of one)."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
