"""How good a pruned model is to a search: its loss, or its divergence from the dense model, on text in stages."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.data.inputs import Batch, Inputs, batches, first
from sparsify.errors import UsageError
from sparsify.model.objective import Objective, head_is_plain, head_logits

Kind = Literal["loss", "kl"]
SLICE = 2048
"""Predicted tokens of which both models' logits are held at once."""


class Fitness:
    """Mean over the predictions of a text, in nats: the objective's loss, or KL(dense || model).

    The last stage has the whole text, each earlier one its beginning. For the divergence the dense model's last hidden
    states are kept, [positions, width], and its logits made anew from them (the head is not pruned), so that memory
    does not grow with the vocabulary. One number is read from the device for each call.

    Args:
        model: dense, now.
        text: what is measured on.
        samples: samples of each stage, ascending.
        objective: the loss.
        kind: `loss` or `kl`.
        batch_size: samples per forward.

    Raises:
        UsageError: a divergence is asked of a model without token logits of its own, or with logits that its head alone
            does not make.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Inputs,
        samples: Sequence[int],
        objective: Objective,
        kind: Kind,
        batch_size: int,
    ) -> None:
        self.model, self.objective, self.kind = model, objective, kind
        device = next(model.parameters()).device
        self.texts = [first(text, count) for count in samples]
        self.batches = [[x.batch(where, device) for where in batches(x, batch_size)] for x in self.texts]
        if kind == "kl":
            _check_head(model, self.batches[-1][0])
            with torch.no_grad():
                self.dense = [_hidden(model, batch) for batch in self.batches[-1]]
        else:
            self.prepared = objective.prepare(model, text)

    @torch.no_grad()
    def __call__(self, stage: int) -> float:
        """The model's fitness as it stands, lower is better; infinite if not a number."""
        measure: Callable[[int, Batch], Tensor] = self._divergence if self.kind == "kl" else self._loss
        sums = [measure(i, batch) for i, batch in enumerate(self.batches[stage])]
        mean = float(torch.stack(sums).sum()) / self._predictions(stage)
        return mean if math.isfinite(mean) else math.inf

    def _loss(self, index: int, batch: Batch) -> Float[Tensor, ""]:
        return self.prepared(self.model, batch)

    def _divergence(self, index: int, batch: Batch) -> Float[Tensor, ""]:
        mine = _hidden(self.model, batch)
        pairs = zip(mine.split(SLICE), self.dense[index][: len(mine)].split(SLICE), strict=True)
        return torch.stack([_kl(self.model, dense, own) for own, dense in pairs]).sum()

    def _predictions(self, stage: int) -> int:
        text = self.texts[stage]
        return len(text) * (text.length - 1) if self.kind == "kl" else self.objective.predictions(text)


def _hidden(model: nn.Module, batch: Batch) -> Float[Tensor, "tok dim"]:
    """Last hidden states at the positions that predict a token, as the loss of next tokens has them."""
    hidden: Tensor = model.base_model(**batch).last_hidden_state  # type: ignore[operator]
    return hidden[:, :-1].flatten(0, 1)


def _kl(model: nn.Module, dense: Float[Tensor, "tok dim"], own: Float[Tensor, "tok dim"]) -> Float[Tensor, ""]:
    target, logits = (head_logits(model, hidden).float().log_softmax(dim=-1) for hidden in (dense, own))
    return F.kl_div(logits, target, log_target=True, reduction="sum").double()


def _check_head(model: nn.Module, batch: Batch) -> None:
    ids = batch.get("input_ids")
    if ids is None or not head_is_plain(model, ids[:1, :8]):
        raise UsageError(
            "The divergence from the dense model needs logits that are the head's of the last hidden states",
            got=type(model).__name__,
            fix="allocator.fitness=loss",
        )


def stages(tokens: Sequence[int], survivors: Sequence[int], length: int, samples: int) -> tuple[list[int], list[int]]:
    """Samples of each stage, and survivors of each but the last, as far as the text goes.

    Stages that would have the same samples are one: the later one's.

    Args:
        tokens: of each stage, rounded up to whole samples.
        survivors: genomes that go on from each stage but the last.
        length: tokens of a sample.
        samples: how many there are.
    """
    counts = [min(-(-wanted // length), samples) for wanted in tokens]
    longer = [i for i in range(len(counts)) if i == len(counts) - 1 or counts[i] < counts[i + 1]]
    return [counts[i] for i in longer], [survivors[i] for i in longer[:-1]]
