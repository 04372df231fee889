"""Several texts to train on, as one."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.data.examples import Examples, as_examples
from sparsify.data.samples import Samples
from sparsify.data.windows import Windows
from sparsify.errors import UsageError


@dataclass(frozen=True)
class Mixture:
    """All examples of several texts, shuffled together by the seed.

    Attributes:
        parts: windows or samples, by a name that only the config reads.
    """

    parts: Mapping[str, Windows | Samples]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("A mixture has parts", got="parts={}", fix="tuning=windows, or a part")

    def inputs(self, tokenizer: Any, seed: int) -> Examples:
        """Make every part and shuffle them together; the same seed gives the same order.

        Raises:
            DataError: a part cannot be made.
        """
        made = [as_examples(part.inputs(tokenizer, seed)) for part in self.parts.values()]
        order = [(example, i) for example in made for i in range(len(example))]
        random.Random(seed).shuffle(order)
        ids, starts = tuple(example.ids[i] for example, i in order), tuple(example.starts[i] for example, i in order)
        provenance = {name: example.provenance for name, example in zip(self.parts, made, strict=True)}
        return Examples(ids, starts, made[0].split, {"parts": provenance})
