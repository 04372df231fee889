"""What a configuration says of the sizes of blocks: one size for all, or `block_sizes` where that cannot say it.

transformers has a key of its own for layers that differ (`per_layer_config`), but hardly a model that builds itself by
it, and configurations that refuse it when they are checked. `block_sizes` is ours: transformers keeps it, builds the
model of the dense sizes and refuses the weights; `model.resized` opens them.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsify.errors import DataError
from sparsify.model.blocks import BlockView, find_blocks
from sparsify.model.coupled import Coupled, coupled, coupled_of
from sparsify.model.removal import remove

QUERIES, KEYS, HEAD = "num_attention_heads", "num_key_value_heads", "head_dim"
CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configurations call the channels of an MLP."""
BLOCK_SIZES = "block_sizes"

Sizes = dict[str, int]
"""Of one block, as the configuration calls them."""


def follow(view: BlockView) -> str | None:
    """Make the configuration say what sizes the blocks have now.

    Where all are alike and the model's class builds itself from that, they are its only sizes; else the sizes of the
    dense model stay and those of each block stand in `block_sizes`.

    Returns:
        Why plain transformers does not open the model when it is saved; None where it does.
    """
    groups = coupled_of(view)
    config = config_of(view.model, groups[0])
    sizes = [sizes_of(config, *groups[i : i + 2]) for i in range(0, len(groups), 2)]
    reason: str | None = "its blocks differ in size"
    if all(other == sizes[0] for other in sizes):
        before = dict(vars(config))
        for name, value in (sizes[0] | {HEAD: groups[0].head_dim}).items():
            setattr(config, name, value)
        reason = unbuilt(view.model, config)
        if reason is None:
            return None
        vars(config).clear()
        vars(config).update(before)
    config.block_sizes = {str(block): own for block, own in enumerate(sizes)}
    return reason


def config_of(model: nn.Module, heads: Coupled) -> Any:
    """The configuration that the attention was made from: of several towers' that of its own."""
    return getattr(heads.module, "config", None) or model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]


def sizes_of(config: Any, heads: Coupled, channels: Coupled) -> Sizes:
    """Heads and channels of a block, by the names that the configuration has for them."""
    sizes = {QUERIES: heads.count * heads.queries, KEYS: heads.count}
    known = vars(config)
    sizes |= {name: channels.count for name in CHANNELS if name in known}
    return {name: size for name, size in sizes.items() if name != KEYS or name in known}


def unbuilt(model: nn.Module, config: Any) -> str | None:
    """Why transformers does not make a model of these shapes from the configuration; None where it does.

    No weight is made for it.

    Args:
        model: of the sizes that are asked about.
        config: the part of its configuration that has them.
    """
    try:
        getattr(config, "validate", lambda: None)()
        with torch.device("meta"):
            plain = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # whatever a class says to sizes that it does not go by
        return " ".join(str(error).split())
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    if shapes == {name: parameter.shape for name, parameter in model.named_parameters()}:
        return None
    return f"{type(model).__name__} does not take these sizes from its configuration"


def stored(tree: Mapping[str, Any]) -> dict[int, Sizes] | None:
    """Sizes by block of a config.json that has any, of the language part where there are several; else None.

    Raises:
        DataError: they are no sizes.
    """
    inner = tree.get("text_config")
    found = tree.get(BLOCK_SIZES) or (inner.get(BLOCK_SIZES) if isinstance(inner, Mapping) else None)
    if not found:
        return None
    try:
        sizes = {int(block): {str(k): int(v) for k, v in own.items()} for block, own in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{BLOCK_SIZES} in config.json is no table of sizes", got=str(found)[:80]) from error
    if odd := {name for own in sizes.values() for name in own} - {QUERIES, KEYS, *CHANNELS}:
        got, allowed = ", ".join(sorted(odd)), ", ".join((QUERIES, KEYS, *CHANNELS))
        raise DataError(f"{BLOCK_SIZES} in config.json names what is not known here", got=got, allowed=allowed)
    return sizes


def resize(model: nn.Module, sizes: Mapping[int, Sizes]) -> None:
    """Bring a model of the dense sizes to those of each block; the values of its weights mean nothing afterwards.

    Raises:
        DataError: a block that there is not, or more heads or channels than the dense model has.
        UnsupportedModelError: as for `coupled.coupled`.
    """
    name, blocks = find_blocks(model)
    for index, own in sizes.items():
        if not 0 <= index < len(blocks):
            allowed = f"0 to {len(blocks) - 1}"
            raise DataError(f"{BLOCK_SIZES} in config.json names no block", got=index, allowed=allowed)
        heads, channels = coupled(blocks[index], index, f"{name}.{index}")
        _cut(heads, own.get(QUERIES, heads.count * heads.queries) // heads.queries)
        _cut(channels, next((own[key] for key in CHANNELS if key in own), channels.count))


def _cut(group: Coupled, units: int) -> None:
    if not 0 < units <= group.count:
        got, allowed = f"{units} {group.kind} in block {group.block}", f"1 to {group.count}"
        raise DataError(f"{BLOCK_SIZES} in config.json asks for sizes out of reach", got=got, allowed=allowed)
    if units < group.count:
        remove(group, range(units))
