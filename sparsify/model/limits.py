"""Whether a model can read what it is given: ids that it has embeddings for, windows that it has positions for."""

import math
import warnings

import torch
from torch import nn

from sparsify.data.inputs import Inputs, TokenInputs
from sparsify.errors import UnsupportedModelError, UsageError
from sparsify.model.blocks import check_model, of_vision

LEARNED = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""Names of embeddings of positions; other models compute theirs."""


def check_readable(model: nn.Module, inputs: Inputs) -> None:
    """Refuse token ids without embeddings and windows without positions; warn of windows beyond a computed context.

    Raises:
        UsageError: with the range that the model has.
    """
    check_model(model)
    if not isinstance(inputs, TokenInputs):
        return
    if not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError("The model reads no token ids", got=type(model).__name__, fix="sparsify.load(...)")
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    low, high = int(inputs.tokens.min()), int(inputs.tokens.max())
    if low < 0 or high >= rows:
        raise UsageError(
            "There are token ids that the model has no embedding for",
            got=f"ids from {low} to {high}",
            allowed=f"0 to {rows - 1}",
            fix="tokenise with the model's own tokenizer",
        )
    learned = learned_positions(model)
    if learned is not None and inputs.length > learned:
        raise UsageError(
            "The windows are longer than the positions that the model has learned",
            got=f"{inputs.length} tokens",
            allowed=f"at most {learned}",
            fix=f"seqlen={learned} (calibration.seqlen, heldout.seqlen, test.seqlen)",
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if learned is None and isinstance(context, int) and inputs.length > context:
        warnings.warn(
            f"Windows of {inputs.length} tokens go beyond the context of {context} that the model was made for "
            "(max_position_embeddings); numbers on them say little about it",
            stacklevel=2,
        )


@torch.no_grad()
def check_causal(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a model whose earlier predictions change with the last token: it sees what it is to predict.

    Encoders load as causal language models and have a perplexity, which means nothing.

    Raises:
        UnsupportedModelError: it is such a model.
    """
    if not isinstance(inputs, TokenInputs) or inputs.length < 2 or model.get_output_embeddings() is None:  # type: ignore[operator]
        return
    tokens = inputs.tokens[:1, :8].to(next(model.parameters()).device)
    other = tokens.clone()
    other[:, -1] = torch.where(tokens[:, -1] == tokens[:, 0], (tokens[:, 0] + 1) % 2, tokens[:, 0])
    one, two = (model(ids, use_cache=False).logits[:, :-1].float() for ids in (tokens, other))
    far = float((one - two).abs().max())
    if math.isfinite(far) and far > 1e-2 * float(one.abs().max()):
        raise UnsupportedModelError(
            "This model is no decoder: what it predicts depends on the tokens after it",
            got=type(model).__name__,
            allowed="causal language models",
            fix="is_decoder=true in its config, if it was trained as one",
        )


def learned_positions(model: nn.Module) -> int | None:
    """The longest window of a model with an embedding for every position; None for other models."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in LEARNED and not of_vision(name):
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None
