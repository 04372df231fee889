"""The dense model, kept once on the host: what pruning, searches and analyses compare with and go back to."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Module:
    """A module's own attributes: its children, parameters and buffers by name, what hangs on it, its sizes."""

    module: nn.Module
    kind: type[nn.Module]
    contents: dict[str, dict[str, Any]]
    plain: dict[str, Any]
    forward: Any
    training: bool

    @classmethod
    def of(cls, module: nn.Module) -> "_Module":
        names = ("_modules", "_parameters", "_buffers", *HOOKS)
        contents = {name: dict(getattr(module, name)) for name in names}
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
        return cls(module, type(module), contents, plain, module.__dict__.get("forward"), module.training)

    def restore(self) -> None:
        self.module.__class__ = self.kind  # a parametrisation is a class of its own
        for name, items in self.contents.items():
            now = getattr(self.module, name)
            now.clear()
            now.update(items)
        vars(self.module).update(self.plain)
        self.module.__dict__.pop("forward", None)
        if self.forward is not None:
            self.module.forward = self.forward
        self.module.training = self.training


@dataclass(frozen=True)
class _Config:
    """A configuration that modules hold, and what it said."""

    config: Any
    contents: dict[str, Any]

    def restore(self) -> None:
        vars(self.config).clear()
        vars(self.config).update(self.contents)


@dataclass(frozen=True)
class _Tensor:
    """A parameter or buffer, where it lies, and a copy of it on the host (pinned where there is an accelerator)."""

    tensor: Tensor
    place: Tensor
    copy: Tensor
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Tensor":
        place = tensor.data
        copy = torch.empty_like(place, device="cpu", pin_memory=place.is_cuda)
        return cls(tensor, place, copy.copy_(place), tensor.requires_grad)

    def restore(self) -> None:
        self.tensor.data = self.place
        self.place.copy_(self.copy, non_blocking=True)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)


class DenseModel(Mapping[str, Tensor]):
    """A model as it was: the prunable weights by layer name, [out, inp] on the host, and everything to restore it.

    Args:
        model: as it is now.
        layers: for every prunable layer, by name, the name of its parameter and how that becomes [out, inp].
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]) -> None:
        self.model = model
        self._layers = layers
        self._modules = [_Module.of(module) for module in model.modules()]
        held = [config for m in model.modules() if hasattr(config := vars(m).get("config"), "__dict__")]
        self._configs = [_Config(x, dict(vars(x))) for x in {id(config): config for config in held}.values()]
        named = [*model.named_parameters(), *model.named_buffers()]  # tied ones once
        self._tensors = {name: _Tensor.of(tensor) for name, tensor in named}

    def __getitem__(self, layer: str) -> Float[Tensor, "out inp"]:
        parameter, oriented = self._layers[layer]
        return oriented(self._tensors[parameter].copy)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything: values, replaced or added modules and parameters, sizes, hooks, flags. Nothing is loaded."""
        for module in self._modules:
            module.restore()
        for config in self._configs:
            config.restore()
        for tensor in self._tensors.values():
            tensor.restore()

    def changed(self) -> dict[str, Tensor]:
        """Parameters and buffers that are not what they were, by name.

        Raises:
            KeyError: the model has one that was not there, or has no longer one that was.
        """
        now = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        if odd := sorted(now.keys() ^ self._tensors.keys()):
            raise KeyError(odd[0])
        return {name: tensor.detach() for name, tensor in now.items() if not self._same(name, tensor)}

    def _same(self, name: str, tensor: Tensor) -> bool:
        copy = self._tensors[name].copy
        return tensor.shape == copy.shape and tensor.dtype == copy.dtype and torch.equal(tensor.detach().cpu(), copy)
