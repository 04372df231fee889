"""A decoder model as a row of blocks with prunable matrices inside; no class per model family."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsify.errors import NumericsError, UnsupportedModelError
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

    Blocks are the items of the largest `ModuleList` whose class transformers names in `_no_split_modules`;
    prunable layers are the `Linear` and `Conv1D` modules inside. Embeddings, head and routers are never pruned.

    Raises:
        UnsupportedModelError: no such list, or experts stored as 3-D parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        prefix, blocks = _find_blocks(model)
        self.blocks = list(blocks)
        self.layers = [layer for i, block in enumerate(self.blocks) for layer in _layers_of(block, i, f"{prefix}.{i}")]
        if not self.layers:
            raise UnsupportedModelError("The model's blocks hold no Linear or Conv1D layer", got=type(model).__name__)
        self.table = LayerTable(tuple(layer.spec for layer in self.layers))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layers[0].weight.device
        return device

    def layers_of(self, block: int) -> list[Layer]:
        return [layer for layer in self.layers if layer.spec.block == block]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every prunable weight, for `restore`."""
        return {layer.spec.name: layer.weight.clone() for layer in self.layers}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write a snapshot back."""
        for layer in self.layers:
            layer.write(weights[layer.spec.name])

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
        zeros = torch.stack([(layer.weight == 0).sum() for layer in self.layers])
        return float(zeros.sum()) / self.table.numel

    def check_finite(self) -> None:
        """Refuse a model with NaN or infinite weights before any work is done on it.

        Raises:
            NumericsError: naming the first such layer.
        """
        finite = torch.stack([torch.isfinite(layer.weight).all() for layer in self.layers]).tolist()
        for layer, good in zip(self.layers, finite, strict=True):
            if not good:
                raise NumericsError(
                    f"Layer {layer.spec.name} holds NaN or infinite weights",
                    got=f"{int((~torch.isfinite(layer.weight)).sum())} of {layer.spec.numel} weights",
                    allowed="finite weights",
                    fix="load the checkpoint again, or with dtype=float32 if it overflows in half precision",
                )


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    wanted = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and {type(m).__name__ for m in module} <= wanted
    ]
    if not lists:
        raise UnsupportedModelError(
            "The decoder blocks of this model were not found",
            got=type(model).__name__,
            allowed=f"a ModuleList of the classes in _no_split_modules ({sorted(wanted) or 'none declared'})",
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _layers_of(block: nn.Module, index: int, prefix: str) -> list[Layer]:
    found = []
    for kind, module in block.named_modules():
        _refuse_stacked_experts(module, f"{prefix}.{kind}")
        if not isinstance(module, nn.Linear | Conv1D) or kind.rsplit(".", 1)[-1] in ROUTERS:
            continue
        shape = tuple(module.weight.shape)
        out, inp = shape[::-1] if isinstance(module, Conv1D) else shape
        found.append(Layer(LayerSpec(f"{prefix}.{kind}", index, kind, out, inp), module))
    return found


def _refuse_stacked_experts(module: nn.Module, name: str) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            raise UnsupportedModelError(
                "Experts stored as one 3-D parameter are not pruned yet",
                got=f"{name}.{key} of shape {tuple(parameter.shape)}",
                allowed="dense decoder models, whose matrices are Linear or Conv1D modules",
            )
