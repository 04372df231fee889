"""Perplexity as the pruning papers compute it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.data import Windows, check_tokens
from sparsify.errors import NumericsError
from sparsify.evaluation.base import Subject

SLICE = 8192
"""Predicted tokens whose logits are held at once."""


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Int[Tensor, "n seq"], *, batch_size: int | None = None) -> float:
    """Exp of the mean cross-entropy (nats) over the seqlen - 1 predicted tokens of every window.

    Windows are independent: each starts without context, and its first token is not predicted. Logits are made in
    slices, so the memory needed does not grow with vocabulary times window; a model whose forward does more to its
    logits than its head (Cohere, Granite) is asked for whole logits instead.

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
    size = batch_size or max(1, (16_384 if device.type != "cpu" else 2_048) // tokens.shape[1])
    loss = _sliced_loss if _head_is_plain(model, tokens[:1, :8].to(device)) else _whole_loss
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in tokens.split(size):
        total += loss(model, batch.to(device))
    mean = float(total) / (tokens.shape[0] * (tokens.shape[1] - 1))
    if not mean < 700:  # exp would overflow; NaN too
        raise NumericsError("The perplexity is not finite", got=mean, fix="dtype=float32 if this is half precision")
    return math.exp(mean)


def _sliced_loss(model: nn.Module, batch: Int[Tensor, "b seq"]) -> Float[Tensor, ""]:
    hidden = model.base_model(batch, use_cache=False).last_hidden_state  # type: ignore[operator]
    predicted = hidden[:, :-1].flatten(0, 1)
    labels = batch[:, 1:].flatten()
    losses = [
        F.cross_entropy(head_logits(model, h).float(), y, reduction="sum")
        for h, y in zip(predicted.split(SLICE), labels.split(SLICE), strict=True)
    ]
    return torch.stack(losses).sum(dtype=torch.float64)


def _whole_loss(model: nn.Module, batch: Int[Tensor, "b seq"]) -> Float[Tensor, ""]:
    logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").double()


def _head_is_plain(model: nn.Module, probe: Int[Tensor, "1 few"]) -> bool:
    """Whether `head_logits` gives what the model's own forward gives; some families scale their logits there."""
    hidden = model.base_model(probe, use_cache=False).last_hidden_state  # type: ignore[operator]
    own = model(probe, use_cache=False).logits.float()
    if not torch.isfinite(own).all():
        return True  # the perplexity itself will say so
    return torch.allclose(head_logits(model, hidden).float(), own, rtol=1e-2, atol=1e-2 * float(own.abs().max()))


def head_logits(model: nn.Module, hidden: Float[Tensor, "*tok dim"]) -> Float[Tensor, "*tok vocab"]:
    """Logits of final hidden states, with the soft cap that some families (Gemma) put on them."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


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
