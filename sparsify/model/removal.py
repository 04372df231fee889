"""Heads and channels taken out of a model: smaller matrices, and the numbers in its modules that follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparsify.model.blocks import BlockView
from sparsify.model.coupled import Coupled, coupled_of

QUERIES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
CHANNELS = ("intermediate_size", "intermediate_dim", "ffn_dim", "inner_dim")
"""What attributes of modules that count units are called."""


@torch.no_grad()
def remove(group: Coupled, keep: Sequence[int]) -> None:
    """Leave only some units of a group, in their order, with their biases; all else of the model is as it was.

    The matrices are new parameters of the same dtype and device. A view of the model is to be refreshed afterwards.

    Args:
        group: of the model as it is.
        keep: indices of the units that stay, ascending.
    """
    before = group.count
    for name, linear in group.rows.items():
        where = positions(keep, group.widths[name], linear.weight.device)
        _replace(linear, "weight", linear.weight[where])
        if linear.bias is not None:
            _replace(linear, "bias", linear.bias[where])
        linear.out_features = len(where)
    for name, linear in group.columns.items():
        where = positions(keep, group.widths[name], linear.weight.device)
        _replace(linear, "weight", linear.weight[:, where])
        linear.in_features = len(where)
    _recount(group, before)


@torch.no_grad()
def silence(group: Coupled, units: Sequence[int]) -> None:
    """Zero the columns that read some units: the model computes what it would without them, at its old size."""
    for name, linear in group.columns.items():
        linear.weight[:, positions(units, group.widths[name], linear.weight.device)] = 0


def positions(units: Sequence[int], width: int, device: torch.device) -> Int[Tensor, " rows"]:
    """Rows (or columns) of the units in a matrix that has `width` of each."""
    first = torch.as_tensor(list(units), dtype=torch.long, device=device) * width
    return (first[:, None] + torch.arange(width, device=device)).flatten()


def shrink(view: BlockView, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Bring a dense model to the sizes of a smaller one, whatever its values; whether anything was to be done.

    Args:
        view: the dense model.
        shapes: of parameters, by name; those that are not there stay as they are.
    """
    now = {name: tuple(parameter.shape) for name, parameter in view.model.named_parameters()}
    if all(name not in now or tuple(shape) == now[name] for name, shape in shapes.items()):
        return False
    for group in coupled_of(view):
        name, linear = next(iter(group.columns.items()))
        columns = shapes.get(f"{name}.weight", linear.weight.shape)[1]
        if columns < linear.in_features:
            remove(group, range(columns // group.widths[name]))
    view.refresh()
    return True


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    needed = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=needed))


def _recount(group: Coupled, before: int) -> None:
    """Attributes of the module that counted its units count those that are left."""
    now = group.count
    if group.kind == "channels":
        _renumber(group.module, CHANNELS, before, now)
    else:
        _renumber(group.module, KEYS, before, now)
        _renumber(group.module, QUERIES, before * group.queries, now * group.queries)


def _renumber(module: Any, names: Sequence[str], before: int, now: int) -> None:
    for name in names:
        if vars(module).get(name) == before:
            setattr(module, name, now)
