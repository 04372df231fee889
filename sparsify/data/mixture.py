"""Several texts to train on, as one."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsify.data.examples import Examples, as_examples
from sparsify.data.generated import Generated
from sparsify.data.samples import Samples
from sparsify.data.windows import Windows
from sparsify.errors import UsageError


@dataclass(frozen=True)
class Mixture:
    """All examples of several texts, shuffled together by the seed.

    Attributes:
        parts: windows, samples or what the model writes, by a name that only the config reads.
    """

    parts: Mapping[str, Windows | Samples | Generated]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("A mixture has parts", got="parts={}", fix="tuning=windows, or a part")

    @property
    def reads_model(self) -> bool:
        return any(isinstance(part, Generated) for part in self.parts.values())

    def inputs(self, tokenizer: Any, seed: int, model: nn.Module | None = None) -> Examples:
        """Make every part and shuffle them together; the same seed gives the same order.

        Args:
            tokenizer: of the model.
            seed: of all draws.
            model: the dense model, if a part is written by it.

        Raises:
            DataError: a part cannot be made.
        """
        made = [_made(part, tokenizer, seed, model) for part in self.parts.values()]
        order = [(example, i) for example in made for i in range(len(example))]
        random.Random(seed).shuffle(order)
        ids, starts = tuple(example.ids[i] for example, i in order), tuple(example.starts[i] for example, i in order)
        provenance = {name: example.provenance for name, example in zip(self.parts, made, strict=True)}
        return Examples(ids, starts, made[0].split, {"parts": provenance})


def _made(part: Windows | Samples | Generated, tokenizer: Any, seed: int, model: nn.Module | None) -> Examples:
    if isinstance(part, Generated):
        assert model is not None  # `reads_model` said so
        return part.inputs(tokenizer, seed, model)
    return as_examples(part.inputs(tokenizer, seed))
