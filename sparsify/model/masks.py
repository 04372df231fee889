"""Which weights of a pruned model are kept: one bit each, on the host, handed on from stage to stage."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from sparsify.errors import NumericsError
from sparsify.model.blocks import BlockView


class Masks(Mapping[str, Tensor]):
    """Masks by layer name, True where a weight is kept, each [out, inp] on the host.

    A weight that is kept may be zero; one that is not kept is.
    """

    def __init__(self) -> None:
        self._packed: dict[str, tuple[UInt8[Tensor, " bytes"], torch.Size]] = {}

    def __getitem__(self, layer: str) -> Bool[Tensor, "out inp"]:
        packed, shape = self._packed[layer]
        return unpacked(packed, shape)

    def __setitem__(self, layer: str, keep: Bool[Tensor, "out inp"]) -> None:
        self._packed[layer] = packed(keep).cpu(), keep.shape

    def put(self, layer: str, bits: UInt8[Tensor, " bytes"], shape: torch.Size | tuple[int, ...]) -> None:
        """A mask as `bits` has it."""
        self._packed[layer] = bits, torch.Size(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def bits(self) -> dict[str, UInt8[Tensor, " bytes"]]:
        """Eight weights a byte, row by row, the first in the lowest bit; by layer name."""
        return {name: packed for name, (packed, _) in self._packed.items()}

    def check_within(self, before: "Masks") -> None:
        """These masks keep nothing that an earlier stage had pruned.

        Raises:
            NumericsError: a layer is gone, or a weight is kept again; the message names the layer.
        """
        for name in before:
            if name not in self or bool((self[name] & ~before[name]).any()):
                raise NumericsError(
                    f"A stage handed on masks of {name} that keep more than those it was given",
                    fix="hand on the masks as they are, or with fewer weights kept",
                )

    def check(self, view: BlockView, fix: str = "a stage after pruning has to keep to the masks it is given") -> None:
        """The zeros that were made are still there.

        Args:
            view: the model.
            fix: what the error advises.

        Raises:
            NumericsError: a weight that is not kept is not zero; the message names its layer.
        """
        for layer in view.layers:
            if layer.spec.name in self and bool(layer.weight[~self[layer.spec.name].to(layer.weight.device)].any()):
                raise NumericsError(
                    f"Weights of {layer.spec.name} that were pruned are no longer zero",
                    fix=fix,
                )


def packed(keep: Bool[Tensor, "out inp"]) -> UInt8[Tensor, " bytes"]:
    """Eight entries a byte, the first in the lowest bit."""
    flat = keep.flatten().to(torch.uint8)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (rows * powers).sum(dim=1, dtype=torch.uint8)


def unpacked(bits: UInt8[Tensor, " bytes"], shape: torch.Size | tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The mask that `packed` made."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    flat = (bits[:, None] & powers).bool().flatten()
    return flat[: torch.Size(shape).numel()].view(shape)
