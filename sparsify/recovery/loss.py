"""What training lowers: cross-entropy of the text, divergence from the dense model, or some of both."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsify.data.inputs import Batch
from sparsify.errors import UsageError
from sparsify.model.objective import head_is_plain, head_logits

SLICE = 2048
"""Predicted tokens whose logits are held at once."""


class TrainingLoss(nn.Module):
    """In nats, summed over the counted tokens of a batch.

    Args:
        model: what is trained.
        dense: the teacher, for `distill`.
        distill: share of KL(dense || model); the rest is the cross-entropy of the text.
    """

    def __init__(self, model: nn.Module, dense: nn.Module | None, distill: float) -> None:
        super().__init__()
        if distill > 0 and dense is None:
            raise UsageError("Distillation needs the dense model", fix="dense=<a copy of it>")
        self.model, self.distill = model, distill
        self.dense = (dense,)  # in a tuple: no part of what is trained or synchronised
        self.plain = True

    def find_head(self, batch: Batch) -> None:
        """See whether the head alone makes the model's logits; in eval mode, where nothing is drawn."""
        self.plain = head_is_plain(self.model, batch["input_ids"][:1, :8])

    def forward(self, batch: Batch, counted: Bool[Tensor, "b seq"], every: bool = False) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            batch: padded token ids.
            counted: tokens that are predicted.
            every: make logits of all positions and drop what does not count afterwards, so that no size depends on
                the text: what a CUDA graph needs.
        """
        predicted = counted[:, 1:]
        pick = _flat if every else (lambda values: values[predicted])
        labels, keep = pick(batch["input_ids"][:, 1:]), pick(predicted)
        mine, dense = pick(self._states(self.model, batch)), self.dense[0] if self.distill else None
        with torch.no_grad():
            theirs = mine.detach() if dense is None else pick(self._states(dense, batch))
        parts = zip(*(values.split(SLICE) for values in (mine, theirs, labels, keep)), strict=True)
        sums = [checkpoint(self._of_slice, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(sums).sum() if sums else mine.sum() * 0.0

    def _states(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b seq dim"]:
        """Last hidden states before each token but the first; logits, where the head alone does not make these."""
        if self.plain:
            states: Tensor = model.base_model(**batch).last_hidden_state  # type: ignore[operator]
        else:
            states = model(**batch).logits
        return states[:, :-1]

    def _of_slice(
        self,
        mine: Float[Tensor, "tok dim"],
        theirs: Float[Tensor, "tok dim"],
        labels: Int[Tensor, " tok"],
        keep: Bool[Tensor, " tok"],
    ) -> Float[Tensor, ""]:
        logits = self._logits(self.model, mine)
        losses = logits.new_zeros(len(logits))
        if self.distill < 1:
            losses = F.cross_entropy(logits, labels, reduction="none") * (1 - self.distill)
        if self.distill and (dense := self.dense[0]) is not None:
            with torch.no_grad():
                wanted = self._logits(dense, theirs).log_softmax(dim=-1)
            divergence = F.kl_div(logits.log_softmax(dim=-1), wanted, log_target=True, reduction="none").sum(dim=-1)
            losses = losses + self.distill * divergence
        return losses.masked_fill(~keep, 0.0).sum()

    def _logits(self, model: nn.Module, states: Tensor) -> Float[Tensor, "tok vocab"]:
        return (head_logits(model, states) if self.plain else states).float()


def _flat(values: Tensor) -> Tensor:
    return values.flatten(0, 1)
