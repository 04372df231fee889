"""What of a block is pruned, what is left alone and why, and what must not be pruned at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sparsify.errors import UnsupportedModelError
from sparsify.types import LayerSpec, Skipped

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last parts of the names of mixture-of-experts routers: tiny, decisive, never pruned."""

ADAPTERS = ("lora_", "hada_", "lokr_", "vera_", "oft_", "boft_", "ia3_", "adapter")
"""How the names of what peft adds to a model begin."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True)
class Layer:
    """A prunable matrix in place: its description, the module that holds it, and which parameter of it.

    Attributes:
        spec: name, block and size.
        module: a `Linear`, a `Conv1D`, or the experts of a block.
        parameter: name of its parameter.
        expert: index on the parameter's first axis, for experts that are stored as one 3-D parameter.
    """

    spec: LayerSpec
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that the matrix is, or is a part of."""
        stored: nn.Parameter = getattr(self.module, self.parameter)
        return stored

    @property
    def stored_name(self) -> str:
        """The name of that parameter in the model."""
        return self.spec.name.removesuffix(f".{self.expert}") if self.expert is not None else f"{self.spec.name}.weight"

    @property
    def weight(self) -> Float[Tensor, "out inp"]:
        """The weight as [out, inp], a view: GPT-2's Conv1D stores it transposed."""
        return self.oriented(self.stored.data)

    def oriented(self, tensor: Tensor) -> Float[Tensor, "out inp"]:
        """A tensor that lies as the parameter does (its gradient, say), as [out, inp]."""
        if self.expert is not None:
            return tensor[self.expert]
        return tensor.T if isinstance(self.module, Conv1D) else tensor

    def write(self, weight: Float[Tensor, "out inp"]) -> None:
        """Overwrite the weight in place; dtype, device and storage stay."""
        self.weight.copy_(weight)


@dataclass(frozen=True)
class _Place:
    """A module of a block and where it is."""

    module: nn.Module
    name: str
    kind: str
    block: int
    experts: int | None

    def layer(self, shape: tuple[int, ...], parameter: str = "weight", expert: int | None = None) -> Layer:
        suffix = "" if expert is None else f".{parameter}.{expert}"
        spec = LayerSpec(self.name + suffix, self.block, self.kind + suffix, *shape)
        return Layer(spec, self.module, parameter, expert)

    def skipped(self, parameter: str, reason: str) -> Skipped:
        tensor = getattr(self.module, parameter)
        return Skipped(f"{self.name}.{parameter}", tuple(tensor.shape), reason)


def prunable(block: nn.Module, index: int, prefix: str, experts: int | None) -> tuple[list[Layer], list[Skipped]]:
    """The matrices of a block that are pruned, in the order of its modules, and those that are not.

    Pruned are the weights of `Linear` and `Conv1D` modules and every expert of a 3-D parameter [experts, out, inp], as
    a matrix of its own. Biases and norms are no matrices and not mentioned.

    Args:
        block: of the model.
        index: its place.
        prefix: its name in the model.
        experts: how many a mixture of the model has.

    Raises:
        UnsupportedModelError: weights that cannot be pruned as what they are; the message names the first.
    """
    layers, skipped = list[Layer](), list[Skipped]()
    for kind, module in block.named_modules():
        place = _Place(module, f"{prefix}.{kind}", kind, index, experts)
        _refuse_adapter(place)
        for found in _linear(place) if isinstance(module, nn.Linear | Conv1D) else _other(place):
            (layers if isinstance(found, Layer) else skipped).append(found)  # type: ignore[arg-type]
    return layers, skipped


def num_experts(config: Any) -> int | None:
    """Experts of a mixture as a model's config, or one inside it, counts them; None where there are none."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)] if config else []
    counts = [getattr(config, key, None) for key in EXPERT_COUNTS] + [num_experts(part) for part in inner]
    return next((count for count in counts if isinstance(count, int) and count > 1), None)


def _linear(place: _Place) -> Iterator[Layer | Skipped]:
    module = place.module
    _refuse_computed(place)
    weight: Any = module.weight
    _refuse_stored_otherwise(place, weight)
    out, inp = tuple(weight.shape)[::-1] if isinstance(module, Conv1D) else tuple(weight.shape)
    if _is_router(place, out):
        yield place.skipped("weight", "router")
    else:
        yield place.layer((out, inp))


def _is_router(place: _Place, out: int) -> bool:
    parts = place.kind.split(".")
    return (
        parts[-1] in ROUTERS
        or (len(parts) > 1 and parts[-2] in ("router", "gate") and place.experts is not None)
        or (place.experts is not None and out in (1, place.experts))
    )


def _other(place: _Place) -> Iterator[Layer | Skipped]:
    """Matrices of a module that is no linear layer."""
    for key, parameter in place.module.named_parameters(recurse=False):
        if parameter.ndim < 2:
            continue
        if isinstance(place.module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d):
            yield place.skipped(key, "convolution")
        elif isinstance(place.module, nn.Embedding):
            yield place.skipped(key, "embedding")
        elif parameter.ndim == 3 and _of_experts(place):
            yield from _experts(place, key, parameter)
        elif _of_experts(place) and parameter.numel() > (place.experts or 1) * max(parameter.shape):
            raise UnsupportedModelError(
                "Experts in this layout are not pruned",
                got=f"{place.name}.{key} of shape {tuple(parameter.shape)} in a {type(place.module).__name__}",
                allowed="experts as Linear modules, or as parameters of shape [experts, out, in]",
            )
        elif _is_router(place, parameter.shape[0]) or "router" in type(place.module).__name__.lower():
            yield place.skipped(key, "router")
        else:
            yield place.skipped(key, f"no linear layer ({type(place.module).__name__})")


def _of_experts(place: _Place) -> bool:
    return "expert" in type(place.module).__name__.lower() and "router" not in type(place.module).__name__.lower()


def _experts(place: _Place, key: str, parameter: nn.Parameter) -> Iterator[Layer]:
    if getattr(place.module, "is_transposed", False) or parameter.shape[0] != place.experts:
        raise UnsupportedModelError(
            "Experts in this layout are not pruned",
            got=f"{place.name}.{key} of shape {tuple(parameter.shape)} in a {type(place.module).__name__}",
            allowed="parameters of shape [experts, out, in]",
        )
    _refuse_stored_otherwise(place, parameter)
    for expert in range(parameter.shape[0]):
        yield place.layer(tuple(parameter.shape[1:]), key, expert)


def _refuse_adapter(place: _Place) -> None:
    leaf = place.kind.rsplit(".", 1)[-1]
    if leaf.startswith(ADAPTERS) or isinstance(getattr(place.module, "base_layer", None), nn.Module):
        raise UnsupportedModelError(
            "A model with adapters is not pruned: merging them would fill the zeros again",
            got=place.name,
            allowed="a model whose adapters are merged",
            fix="model = model.merge_and_unload() (peft), then prune",
        )


def _refuse_computed(place: _Place) -> None:
    """A weight that a hook or a parametrisation writes anew at every forward has no zeros to keep."""
    if "weight" not in place.module._parameters:
        masked = "weight_orig" in place.module._parameters
        raise UnsupportedModelError(
            "This weight is computed from another one at every forward, so zeros in it would not stay",
            got=f"{place.name}.weight ({'torch.nn.utils.prune' if masked else 'a parametrisation'})",
            allowed="weights that are parameters themselves",
            fix=f"torch.nn.utils.{'prune.remove' if masked else 'parametrize.remove_parametrizations'}"
            "(module, 'weight') first",
        )


def _refuse_stored_otherwise(place: _Place, weight: Tensor) -> None:
    """Packed, quantised, float8 and absent weights: what is in memory is not the matrix."""
    if weight.is_meta:
        raise UnsupportedModelError(
            "This weight is not in memory: it is offloaded until it is used",
            got=f"{place.name} on the meta device",
            allowed="weights on a CPU or on accelerators",
            fix="load the model without offloading to cpu or disk (a device_map of accelerators alone is fine)",
        )
    stated = getattr(place.module, "out_features", None), getattr(place.module, "in_features", None)
    linear = isinstance(place.module, nn.Linear)
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or (
        linear and tuple(weight.shape) != stated
    ):
        raise UnsupportedModelError(
            "Quantised or packed weights are not pruned: a zero of theirs is a code, not a zero",
            got=f"{place.name}: {type(place.module).__name__} with {weight.dtype} of shape {tuple(weight.shape)}",
            allowed="float32, float16 or bfloat16 of shape [out, in]",
            fix="load the checkpoint that it was quantised from; prune first, quantise after",
        )
