"""What a model is run on: samples that come as keyword arguments of its forward, whatever they are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.errors import DataError, UsageError
from sparsify.types import check_whole

Batch = dict[str, Any]
"""Keyword arguments of one forward; tensors have the samples on their first axis."""


@runtime_checkable
class Inputs(Protocol):
    """Samples to calibrate, search or evaluate on. Text is one kind of them.

    Attributes:
        split: of the data they were taken from.
        length: positions (tokens, patches) of a sample: what the size of a batch goes by.
        provenance: where they come from, for the record.
    """

    @property
    def split(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def provenance(self) -> dict[str, Any]: ...
    @property
    def digest(self) -> str:
        """Hash of the content: equal inputs have equal digests."""

    def __len__(self) -> int:
        """Number of samples."""

    def take(self, which: slice | Sequence[int]) -> "Inputs":
        """Some of the samples, in that order."""

    def batch(self, where: slice, device: torch.device) -> Batch:
        """Keyword arguments for these samples, on the device."""

    def probe(self, device: torch.device) -> Batch:
        """As little as a forward can be tried with."""

    def few(self) -> "Inputs":
        """Two samples, or one, cut short where that can be done."""


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """Windows of token ids for a decoder, [n, seqlen]."""

    tokens: Int[Tensor, "n seq"]
    split: str = "given"
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def digest(self) -> str:
        return f"{tuple(self.tokens.shape)} {hash_tokens(self.tokens)}"

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, which: slice | Sequence[int]) -> "TokenInputs":
        chosen = which if isinstance(which, slice) else torch.as_tensor(which)
        return TokenInputs(self.tokens[chosen], self.split, self.provenance)

    def batch(self, where: slice, device: torch.device) -> Batch:
        return {"input_ids": self.tokens[where].to(device), "use_cache": False}

    def probe(self, device: torch.device) -> Batch:
        return {"input_ids": self.tokens[:1, :2].to(device), "use_cache": False}

    def few(self) -> "TokenInputs":
        return TokenInputs(self.tokens[:2, :16], self.split, self.provenance)


def as_inputs(given: Any, least: int = 1) -> Inputs:
    """Inputs as they are, or a tensor of token ids as inputs.

    Args:
        given: inputs, or token ids [n, seqlen].
        least: tokens that a window must have.

    Raises:
        UsageError: something else.
        DataError: no sample, or windows shorter than `least` tokens.
    """
    foreign = isinstance(given, Tensor) or not isinstance(given, Inputs)
    inputs: Inputs = TokenInputs(_token_ids(given)) if foreign else given
    if len(inputs) == 0 or inputs.length < least:
        raise DataError(
            f"At least one window of at least {least} tokens is needed",
            got=f"{len(inputs)} of length {inputs.length}",
            allowed="token ids of shape [n, seqlen]",
        )
    return inputs


def _token_ids(tokens: Any) -> Tensor:
    whole = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if not isinstance(tokens, Tensor) or tokens.dtype not in whole:
        kind = str(tokens.dtype) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise UsageError("tokens are ids in a LongTensor", got=kind, allowed="shape [n, seqlen], dtype torch.long")
    if tokens.ndim != 2:
        raise DataError(
            "Token ids have two axes", got=f"a tensor of shape {tuple(tokens.shape)}", allowed="shape [n, seqlen]"
        )
    return tokens.long()


def batches(inputs: Inputs, size: int) -> list[slice]:
    """The samples in order, `size` at a time."""
    return [slice(start, min(start + size, len(inputs))) for start in range(0, len(inputs), size)]


def check_batch_size(size: int | None) -> int | None:
    """The number of samples per forward, if it is one.

    Raises:
        UsageError: no whole number, or below one.
    """
    check_whole("batch_size", size, or_null=True)
    return size


def first(inputs: Inputs, count: int | None) -> Inputs:
    """The first samples; all for None."""
    return inputs.take(slice(0, count))


def hash_tokens(tokens: Int[Tensor, "n seq"]) -> str:
    """SHA-256 of token ids as 64-bit integers."""
    return hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
