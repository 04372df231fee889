"""A decoder model as a row of blocks with prunable matrices inside; no class per model family."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsify.errors import NumericsError, UnsupportedModelError, UsageError
from sparsify.model.dense import DenseModel
from sparsify.types import LayerSpec, LayerTable

ROUTERS = ("gate", "router")
"""Module names of mixture-of-experts routers: tiny, decisive, never pruned."""


@dataclass(frozen=True)
class Layer:
    """A prunable matrix in place: its description and the module that holds it."""

    spec: LayerSpec
    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Float[Tensor, "out inp"]:
        """The weight as [out, inp], a view: GPT-2's Conv1D stores it transposed."""
        return self.oriented(self.module.weight.data)

    def oriented(self, tensor: Tensor) -> Float[Tensor, "out inp"]:
        """A tensor that lies as the module's parameter does (its gradient, say), as [out, inp]."""
        return tensor.T if isinstance(self.module, Conv1D) else tensor

    def write(self, weight: Float[Tensor, "out inp"]) -> None:
        """Overwrite the weight in place; dtype, device and storage stay."""
        self.weight.copy_(weight)


class BlockView:
    """The blocks of a model and the prunable layers in each.

    Blocks are the items of a `ModuleList` whose class transformers names in `_no_split_modules`; of several such lists
    (towers) the decoder's, or the one that `part` names. Prunable layers are the `Linear` and `Conv1D` modules inside.
    Embeddings, head and routers are never pruned.

    Args:
        model: any transformers model.
        part: `language`, `vision`, or the name of a module that holds the blocks; None for the decoder.

    Raises:
        UnsupportedModelError: no such list, or experts stored as 3-D parameters.
        UsageError: no list of blocks in that part; the message names the parts there are.
    """

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        self.model = model
        prefix, blocks = _find_blocks(model, part)
        self.blocks = list(blocks)
        self.layers = [layer for i, block in enumerate(self.blocks) for layer in _layers_of(block, i, f"{prefix}.{i}")]
        if not self.layers:
            raise UnsupportedModelError("The model's blocks hold no Linear or Conv1D layer", got=type(model).__name__)
        self.table = LayerTable(tuple(layer.spec for layer in self.layers))

    @property
    def device(self) -> torch.device:
        """Where the first block is; a model may be spread over several devices."""
        device: torch.device = self.layers[0].weight.device
        return device

    def layers_of(self, block: int) -> list[Layer]:
        return [layer for layer in self.layers if layer.spec.block == block]

    def snapshot(self) -> DenseModel:
        """Everything about the model as it is now, in a copy on the host, for `restore`."""
        return DenseModel(self.model, {layer.spec.name: layer.oriented for layer in self.layers})

    def restore(self, dense: DenseModel) -> None:
        """Make the model what it was at the snapshot, whatever has been changed in it."""
        dense.restore()

    @contextmanager
    def replaced(self, block: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other weights in the matrices of a block, by layer name; put back whatever happens inside."""
        layers = self.layers_of(block)
        before = [layer.weight.clone() for layer in layers]
        try:
            for layer in layers:
                layer.write(weights[layer.spec.name])
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.write(weight)

    def sparsity(self) -> float:
        """Counted zeros over all prunable weights."""
        zeros = [(layer.weight == 0).sum() for layer in self.layers]
        return sum(int(count) for count in zeros) / self.table.numel

    def check_finite(self) -> None:
        """Refuse a model with NaN or infinite weights before any work is done on it.

        Raises:
            NumericsError: naming the first such layer.
        """
        finite = [torch.isfinite(layer.weight).all() for layer in self.layers]
        for layer, good in zip(self.layers, finite, strict=True):
            if not good:
                raise NumericsError(
                    f"Layer {layer.spec.name} holds NaN or infinite weights",
                    got=f"{int((~torch.isfinite(layer.weight)).sum())} of {layer.spec.numel} weights",
                    allowed="finite weights",
                    fix="load the checkpoint again, or with dtype=float32 if it overflows in half precision",
                )


LANGUAGE, VISION = ("language", "text", "decoder"), ("vision", "visual", "image")
"""What the names of towers contain."""


def _find_blocks(model: nn.Module, part: str | None) -> tuple[str, nn.ModuleList]:
    declared = set(getattr(model, "_no_split_modules", None) or ())
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and {type(m).__name__ for m in module} <= declared
    }
    if not lists:
        raise UnsupportedModelError(
            "The decoder blocks of this model were not found",
            got=type(model).__name__,
            allowed=f"a ModuleList of the classes in _no_split_modules ({sorted(declared) or 'none declared'})",
        )
    chosen = _of_part(lists, part) if part is not None else _of_decoder(model, lists)
    return max(chosen.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _of_part(lists: Mapping[str, nn.ModuleList], part: str) -> dict[str, nn.ModuleList]:
    words = {"language": LANGUAGE, "vision": VISION}.get(part)
    chosen = {
        name: blocks
        for name, blocks in lists.items()
        if (any(word in name for word in words) if words else name == part or name.startswith(f"{part}."))
    }
    if part == "language" and not chosen:  # a model that is nothing else
        chosen = {name: blocks for name, blocks in lists.items() if not any(word in name for word in VISION)}
    if not chosen:
        raise UsageError(
            "The model has no blocks in that part", got=f"part={part}", allowed=", ".join(lists), fix="leave part out"
        )
    return chosen


def _of_decoder(model: nn.Module, lists: Mapping[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Of several towers the one that text goes through, where transformers knows it; else all of them."""
    if len(lists) == 1 or not hasattr(model, "get_decoder"):
        return dict(lists)
    inside = {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]
    return {name: blocks for name, blocks in lists.items() if id(blocks) in inside} or dict(lists)


def _layers_of(block: nn.Module, index: int, prefix: str) -> list[Layer]:
    layers = []
    for kind, module in block.named_modules():
        _refuse_stacked_experts(module, f"{prefix}.{kind}")
        if not isinstance(module, nn.Linear | Conv1D) or kind.rsplit(".", 1)[-1] in ROUTERS:
            continue
        shape = tuple(module.weight.shape)
        out, inp = shape[::-1] if isinstance(module, Conv1D) else shape
        layers.append(Layer(LayerSpec(f"{prefix}.{kind}", index, kind, out, inp), module))
    return layers


def _refuse_stacked_experts(module: nn.Module, name: str) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            raise UnsupportedModelError(
                "Experts stored as one 3-D parameter are not pruned yet",
                got=f"{name}.{key} of shape {tuple(parameter.shape)}",
                allowed="dense decoder models, whose matrices are Linear or Conv1D modules",
            )
