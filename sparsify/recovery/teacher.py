"""The dense model beside the one that is trained, for distillation."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.model.blocks import BlockView


@torch.no_grad()
def dense_copy(view: BlockView, dense: Mapping[str, Tensor]) -> nn.Module:
    """A whole copy of the model, with these weights in its prunable layers, where the model is.

    Args:
        view: the model; its weights are what they were when this returns or raises.
        dense: weights by layer name, [out, inp].
    """
    now = {layer.spec.name: layer.weight.clone() for layer in view.layers}
    try:
        for layer in view.layers:
            layer.write(dense[layer.spec.name].to(layer.weight.device))
        return copy.deepcopy(view.model).eval().requires_grad_(False)
    finally:
        for layer in view.layers:
            layer.write(now[layer.spec.name])
