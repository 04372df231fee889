"""The language-modelling loss of windows of tokens, with logits in slices. Evaluation and searches share it."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

SLICE = 8192
"""Predicted tokens whose logits are held at once."""

Loss = Callable[[nn.Module, Int[Tensor, "b seq"]], Tensor]


def summed_loss(model: nn.Module, probe: Int[Tensor, "1 few"]) -> Loss:
    """A function of (model, windows [b, seq]): summed cross-entropy (nats) of the predicted tokens, a double scalar.

    It makes logits in slices, so that the memory needed does not grow with vocabulary times window, unless the model's
    forward does more to its logits than its head (Cohere, Granite): that is tried on `probe`, and such a model is asked
    for whole logits instead.
    """
    return _sliced if head_is_plain(model, probe) else _whole


def batch_size_for(device: torch.device, seqlen: int) -> int:
    """Windows per forward where rounding does not matter: 16,384 tokens on an accelerator, 2,048 on a CPU."""
    return max(1, (16_384 if device.type != "cpu" else 2_048) // seqlen)


def _sliced(model: nn.Module, batch: Int[Tensor, "b seq"]) -> Float[Tensor, ""]:
    hidden = model.base_model(batch, use_cache=False).last_hidden_state  # type: ignore[operator]
    predicted = hidden[:, :-1].flatten(0, 1)
    labels = batch[:, 1:].flatten()
    losses = [
        F.cross_entropy(head_logits(model, h).float(), y, reduction="sum")
        for h, y in zip(predicted.split(SLICE), labels.split(SLICE), strict=True)
    ]
    return torch.stack(losses).sum(dtype=torch.float64)


def _whole(model: nn.Module, batch: Int[Tensor, "b seq"]) -> Float[Tensor, ""]:
    logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").double()


@torch.no_grad()
def head_is_plain(model: nn.Module, probe: Int[Tensor, "1 few"]) -> bool:
    """Whether `head_logits` gives what the model's own forward gives; some families scale their logits there."""
    hidden = model.base_model(probe, use_cache=False).last_hidden_state  # type: ignore[operator]
    own = model(probe, use_cache=False).logits.float()
    if not torch.isfinite(own).all():
        return True  # the loss itself will say so
    return torch.allclose(head_logits(model, hidden).float(), own, rtol=1e-2, atol=1e-2 * float(own.abs().max()))


def head_logits(model: nn.Module, hidden: Float[Tensor, "*tok dim"]) -> Float[Tensor, "*tok vocab"]:
    """Logits of final hidden states, with the soft cap that some families (Gemma) put on them."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
