"""What a model is good or bad at: the loss that evaluations, searches and gradients share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.data.inputs import Batch, Inputs, as_inputs, batches, check_batch_size
from sparsify.errors import NumericsError
from sparsify.model.limits import check_causal, check_readable

SLICE = 8192
"""Predicted tokens whose logits are held at once."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""Loss of a batch in nats, summed over its predictions: a double scalar."""


@runtime_checkable
class Objective(Protocol):
    """A loss to measure a model by.

    Attributes:
        version: raised whenever a change moves its numbers; part of a run's identity.
    """

    @property
    def version(self) -> int: ...

    def prepare(self, model: nn.Module, inputs: Inputs) -> Loss:
        """The loss for this kind of model, after a look at it with a few of the inputs."""

    def predictions(self, inputs: Inputs) -> int:
        """How many predictions the loss of all these inputs is summed over."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of every token but the first of its window, given those before it.

    Logits are made in slices, so that the memory needed does not grow with vocabulary times window, unless the model's
    forward does more to its logits than its head (Cohere, Granite): that is tried on a few tokens, and such a model is
    asked for whole logits instead.
    """

    version: int = 1

    def prepare(self, model: nn.Module, inputs: Inputs) -> Loss:
        """The loss of windows of token ids, batches of `input_ids` [b, seq]."""
        ids = inputs.batch(slice(0, 1), next(model.parameters()).device)["input_ids"]
        return _sliced if head_is_plain(model, ids[:, :8]) else _whole

    def predictions(self, inputs: Inputs) -> int:
        return len(inputs) * (inputs.length - 1)


def mean_loss(
    model: nn.Module,
    inputs: Inputs,
    objective: Objective | None = None,
    *,
    batch_size: int | None = None,
    loss: Loss | None = None,
) -> float:
    """Mean loss in nats per prediction of the model as it stands; not finite where the model is broken.

    Args:
        model: in eval mode.
        inputs: what it is measured on.
        objective: the loss; next tokens for None.
        batch_size: samples per forward; None picks one for the device.
        loss: what the objective prepared for this model before, if it has.
    """
    objective = objective or NextToken()
    device = next(model.parameters()).device
    loss = loss or objective.prepare(model, inputs)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for where in batches(inputs, batch_size or batch_size_for(device, inputs.length)):
            total += loss(model, inputs.batch(where, device)).to(device)
    return float(total) / objective.predictions(inputs)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    inputs: Inputs | Int[Tensor, "n seq"],
    *,
    objective: Objective | None = None,
    batch_size: int | None = None,
) -> float:
    """Exp of the mean cross-entropy (nats) over the seqlen - 1 predicted tokens of every window.

    Windows are independent: each starts without context, and its first token is not predicted.

    Args:
        model: a transformers causal language model, in eval mode.
        inputs: windows of token ids, [n, seqlen] with seqlen >= 2.
        objective: another loss than that of next tokens.
        batch_size: windows per forward; None picks one for the device.

    Raises:
        DataError: no windows, or windows of fewer than two tokens.
        UsageError: not token ids, or a batch size below one.
        NumericsError: the perplexity is not finite.
    """
    given = as_inputs(inputs, 2)
    check_readable(model, given)
    check_causal(model, given)
    mean = mean_loss(model, given, objective, batch_size=check_batch_size(batch_size))
    if not mean < 700:  # exp would overflow; NaN too
        raise NumericsError("The perplexity is not finite", got=mean, fix="dtype=float32 if this is half precision")
    return math.exp(mean)


def batch_size_for(device: torch.device, length: int) -> int:
    """Samples per forward where rounding does not matter: 16,384 positions on an accelerator, 2,048 on a CPU."""
    return max(1, (16_384 if device.type != "cpu" else 2_048) // length)


def _sliced(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    hidden = model.base_model(**batch).last_hidden_state  # type: ignore[operator]
    predicted = hidden[:, :-1].flatten(0, 1)
    labels = batch["input_ids"][:, 1:].flatten().to(hidden.device)  # a model may be spread over devices
    losses = [
        F.cross_entropy(head_logits(model, h).float(), y, reduction="sum")
        for h, y in zip(predicted.split(SLICE), labels.split(SLICE), strict=True)
    ]
    return torch.stack(losses).sum(dtype=torch.float64)


def _whole(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
    labels = batch["input_ids"][:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum").double()


@torch.no_grad()
def head_is_plain(model: nn.Module, probe: Int[Tensor, "1 few"]) -> bool:
    """Whether `head_logits` gives what the model's own forward gives; some families scale their logits there."""
    hidden = model.base_model(probe, use_cache=False).last_hidden_state  # type: ignore[operator]
    own = model(probe, use_cache=False).logits.float().to(hidden.device)
    if not torch.isfinite(own).all():
        return True  # the loss itself will say so
    return torch.allclose(
        head_logits(model, hidden).float().to(own.device), own, rtol=1e-2, atol=1e-2 * float(own.abs().max())
    )


def head_logits(model: nn.Module, hidden: Float[Tensor, "*tok dim"]) -> Float[Tensor, "*tok vocab"]:
    """Logits of final hidden states, with the soft cap that some families (Gemma) put on them."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
