"""What enters the experts of a block, of which many share one parameter and none is a module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsify.model.prunable import Layer


class Routed(TorchFunctionMode):
    """While it is open, `seen(name, x)` is told of the tokens [tokens, inp] that enter every expert's matrix.

    An expert's matrix is a slice of a parameter: it is known by where it lies when `linear` is called with it.

    Args:
        layers: experts.
        seen: told before the product is taken.
    """

    def __init__(self, layers: list[Layer], seen: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.names = {_place(layer.weight): layer.spec.name for layer in layers}
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(args) > 1 and (name := self.names.get(_place(args[1]))) is not None:
            self.seen(name, args[0])
        return func(*args, **(kwargs or {}))


def _place(weight: Tensor) -> tuple[int, tuple[int, ...]]:
    return weight.data_ptr(), tuple(weight.shape)


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Experts that are run one after the other, each by a `linear` of its own, not by a grouped product."""
    setter = getattr(model, "set_experts_implementation", None)
    if setter is None:
        yield
        return
    before = model.get_experts_implementation()  # type: ignore[operator]
    setter("eager")
    try:
        yield
    finally:
        setter(before)
