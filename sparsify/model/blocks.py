"""A decoder model as a row of blocks with prunable matrices inside; no class per model family."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import NumericsError, UnsupportedModelError, UsageError
from sparsify.model.dense import DenseModel
from sparsify.model.prunable import Layer, num_experts, prunable
from sparsify.types import LayerTable


class BlockView:
    """The blocks of a model and the prunable layers in each.

    Blocks are the items of a `ModuleList` whose class transformers names in `_no_split_modules`; of several such lists
    (towers) the decoder's, or the one that `part` names. Prunable layers are the `Linear` and `Conv1D` modules inside,
    and experts stored as [experts, out, in]. Embeddings, head and routers are never pruned; `skipped` names what
    else of the blocks is not.

    Args:
        model: any transformers model.
        part: `language`, `vision`, or the name of a module that holds the blocks; None for the decoder.

    Attributes:
        prefix: name of the list of blocks in the model.
        blocks: in order.
        layers: in the order of the modules.
        skipped: what of the blocks is not pruned.
        table: the layers as they are now.
        numel: prunable weights when the view was made.

    Raises:
        UnsupportedModelError: no such list, an encoder, or weights that cannot be pruned as what they are (`prunable`).
        UsageError: no list of blocks in that part; the message names the parts there are.
    """

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        check_model(model)
        if part is not None and not isinstance(part, str):
            raise UsageError(
                "part is text", got=repr(part)[:80], allowed="language, vision, a module's name", fix="part=None"
            )
        self.model = model
        config = getattr(model, "config", None)
        refuse_encoder_decoder(getattr(config, "is_encoder_decoder", False), type(model).__name__)
        self.prefix, blocks = find_blocks(model, part)
        self.blocks = list(blocks)
        self.refresh()
        if not self.layers:
            raise UnsupportedModelError("The model's blocks hold no Linear or Conv1D layer", got=type(model).__name__)
        _refuse_shared(self.layers)
        self.numel = self.table.numel
        self.has_experts = any(layer.expert is not None for layer in self.layers)
        self.verified = False  # whether a walk has been held against the model's own forward

    def refresh(self) -> None:
        """Read the layers and their sizes from the blocks again, after rows or columns of them went or came back."""
        experts = num_experts(getattr(self.model, "config", None))
        found = [prunable(block, i, f"{self.prefix}.{i}", experts) for i, block in enumerate(self.blocks)]
        self.layers = [layer for layers, _ in found for layer in layers]
        self.skipped = [matrix for _, skipped in found for matrix in skipped]
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
        return DenseModel(self.model, {x.spec.name: (x.stored_name, x.oriented) for x in self.layers})

    def restore(self, dense: DenseModel) -> None:
        """Make the model what it was at the snapshot, whatever has been changed in it."""
        dense.restore()
        if any(layer.weight.shape != (layer.spec.out_features, layer.spec.in_features) for layer in self.layers):
            self.refresh()

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
        """Counted zeros over all prunable weights.

        Of a model that lost heads or channels, the share of its weights that are gone: what is left of it is dense, and
        a zero there is one of the model's own.
        """
        if self.table.numel < self.numel:
            return (self.numel - self.table.numel) / self.numel
        zeros = [(layer.weight == 0).sum() for layer in self.layers]
        return sum(int(count) for count in zeros) / self.numel

    def check_finite(self) -> None:
        """Refuse a model with NaN or infinite weights before any work is done on it.

        Raises:
            NumericsError: naming the first such parameter.
        """
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if not parameter.is_meta]
        finite = [torch.isfinite(parameter).all() for _, parameter in named]
        for (name, parameter), good in zip(named, finite, strict=True):
            if not good:
                raise NumericsError(
                    f"{name.removesuffix('.weight')} holds NaN or infinite weights",
                    got=f"{int((~torch.isfinite(parameter)).sum())} of {parameter.numel()} weights",
                    allowed="finite weights",
                    fix="load the checkpoint again, or with dtype=float32 if it overflows in half precision",
                )


def check_model(model: Any) -> None:
    """Refuse what is no module of torch.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(model, nn.Module):
        fix = 'model, tokenizer = sparsify.load("smollm2-135m")'
        raise UsageError("A model is a module of torch", got=repr(model)[:80], fix=fix)


def refuse_encoder_decoder(is_one: bool, name: str) -> None:
    """Refuse a model of two parts of which the second reads the first.

    Raises:
        UnsupportedModelError: it is one.
    """
    if is_one:
        raise UnsupportedModelError(
            "An encoder-decoder is not pruned: its decoder's blocks read a second sequence",
            got=name,
            allowed="decoder language models",
        )


def _refuse_shared(layers: list[Layer]) -> None:
    """Blocks that share their matrices would be pruned twice, by two plans."""
    owners: dict[tuple[int, int | None], str] = {}
    for layer in layers:
        first = owners.setdefault((id(layer.stored), layer.expert), layer.spec.name)
        if first != layer.spec.name:
            raise UnsupportedModelError(
                "Two blocks share a matrix, which cannot have two sparsities", got=f"{first} is {layer.spec.name}"
            )


LANGUAGE, VISION = ("language", "text", "decoder"), ("vision", "visual", "image")
"""What the names of towers contain."""


def of_vision(name: str) -> bool:
    """Whether a module's name says that it is of a vision tower."""
    return any(word in name for word in VISION)


def find_blocks(model: nn.Module, part: str | None = None) -> tuple[str, nn.ModuleList]:
    """The name of the list of blocks in the model, and the list.

    Raises:
        UnsupportedModelError: there is none.
        UsageError: there is none in that part.
    """
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
        chosen = {name: blocks for name, blocks in lists.items() if not of_vision(name)}
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
