"""What a model is trained on: sequences of unequal length, and which of their tokens are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparsify.data.inputs import Batch, Inputs, TokenInputs, hash_tokens
from sparsify.errors import UsageError

PADDING = 0
"""Any id that every vocabulary has."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences of token ids to train a decoder on.

    A batch is padded on the right and has no attention mask. No position of a causal model sees what comes after it, so
    padding changes nothing before it, and `counted` leaves it out of the loss. Where every position is counted, as in
    calibration statistics, padding would be too: examples are for training.

    Attributes:
        ids: one sequence [len] each, of unequal lengths.
        starts: of each sequence the first position whose token is predicted and counts; 1 for the whole text, since the
            first token has nothing that it could be predicted from.
        split: of the data they were taken from.
        provenance: where they come from, for the record.
    """

    ids: tuple[Int[Tensor, " _"], ...]
    starts: tuple[int, ...]
    split: str = "given"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.starts):
            raise UsageError(
                "Every example has a start", got=f"{len(self.ids)} sequences, {len(self.starts)} starts", fix="one each"
            )
        for number, (ids, start) in enumerate(zip(self.ids, self.starts, strict=True)):
            if not 1 <= start < len(ids):
                raise UsageError(
                    "An example predicts at least one token from those before it",
                    got=f"start {start} of the {len(ids)} tokens of example {number}",
                    allowed="1 <= start < tokens",
                )

    @property
    def length(self) -> int:
        """Tokens of the longest."""
        return max((len(ids) for ids in self.ids), default=0)

    @property
    def digest(self) -> str:
        places = torch.tensor([[len(ids) for ids in self.ids], self.starts], dtype=torch.long)
        return f"{len(self)} {hash_tokens(places)} {hash_tokens(self._joined)}"

    @property
    def _joined(self) -> Int[Tensor, "1 total"]:
        return torch.cat([torch.empty(0, dtype=torch.long), *self.ids])[None]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, which: slice | Sequence[int]) -> "Examples":
        places = range(len(self))[which] if isinstance(which, slice) else which
        ids, starts = tuple(self.ids[i] for i in places), tuple(self.starts[i] for i in places)
        return Examples(ids, starts, self.split, self.provenance)

    def batch(self, where: slice, device: torch.device) -> Batch:
        """Token ids [b, longest of these], padded on the right."""
        ids = pad_sequence(list(self.ids[where]), batch_first=True, padding_value=PADDING)
        return {"input_ids": ids.to(device), "use_cache": False}

    def counted(self, where: slice, device: torch.device) -> Bool[Tensor, "b seq"]:
        """True where the token of that position is one to predict: from its start on, and no padding."""
        lengths = torch.tensor([len(ids) for ids in self.ids[where]], device=device)[:, None]
        starts = torch.tensor(self.starts[where], device=device)[:, None]
        positions = torch.arange(int(lengths.max()), device=device)[None]
        return (starts <= positions) & (positions < lengths)

    def probe(self, device: torch.device) -> Batch:
        return {"input_ids": self.ids[0][None, :2].to(device), "use_cache": False}

    def few(self) -> "Examples":
        ids = tuple(ids[:16] for ids in self.ids[:2])
        starts = tuple(min(start, len(cut) - 1) for start, cut in zip(self.starts, ids, strict=False))
        return Examples(ids, starts, self.split, self.provenance)


def as_examples(inputs: Inputs) -> Examples:
    """Examples as they are; windows of tokens as examples of which the whole text is predicted.

    Raises:
        UsageError: other inputs, which do not say what is predicted, or windows of a single token.
    """
    if isinstance(inputs, Examples):
        return inputs
    if not isinstance(inputs, TokenInputs):
        raise UsageError(
            "Training needs a text: examples, or windows of tokens",
            got=type(inputs).__name__,
            allowed="Examples, TokenInputs",
        )
    return Examples(tuple(inputs.tokens), (1,) * len(inputs), inputs.split, inputs.provenance)
