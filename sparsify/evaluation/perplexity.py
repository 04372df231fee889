"""Perplexity as the pruning papers compute it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparsify.data.windows import Windows, check_tokens
from sparsify.errors import NumericsError
from sparsify.evaluation.base import Subject
from sparsify.model.loss import batch_size_for, summed_loss


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Int[Tensor, "n seq"], *, batch_size: int | None = None) -> float:
    """Exp of the mean cross-entropy (nats) over the seqlen - 1 predicted tokens of every window.

    Windows are independent: each starts without context, and its first token is not predicted.

    Args:
        model: a transformers causal language model, in eval mode.
        tokens: token ids, [n, seqlen] with seqlen >= 2.
        batch_size: windows per forward; None picks one for the device.

    Raises:
        DataError: no windows, or windows of fewer than two tokens.
        UsageError: not token ids, or a batch size below one.
        NumericsError: the perplexity is not finite.
    """
    check_tokens(tokens, 2, batch_size)
    device = next(model.parameters()).device
    size = batch_size or batch_size_for(device, tokens.shape[1])
    loss = summed_loss(model, tokens[:1, :8].to(device))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in tokens.split(size):
        total += loss(model, batch.to(device))
    mean = float(total) / (tokens.shape[0] * (tokens.shape[1] - 1))
    if not mean < 700:  # exp would overflow; NaN too
        raise NumericsError("The perplexity is not finite", got=mean, fix="dtype=float32 if this is half precision")
    return math.exp(mean)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on one choice of windows, with the protocol tag that numbers must share to be compared.

    Attributes:
        windows: which text.
    """

    windows: Windows
    version: int = 1

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """`perplexity`, its `protocol` and the provenance of the text."""
        text = subject.cut(self.windows)
        value = perplexity(subject.model, text.tokens, batch_size=subject.batch_size)
        return {"metric": "perplexity", "value": value, "protocol": self.windows.protocol, "text": text.provenance}
