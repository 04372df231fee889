"""A dense model that the cells of a process share: loaded once, put back before each."""

import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from sparsify.cells.cell import Cell
from sparsify.data.generated import Generated
from sparsify.data.inputs import Inputs
from sparsify.data.mixture import Mixture
from sparsify.data.samples import Samples
from sparsify.data.windows import Windows
from sparsify.evaluation.base import Subject
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.sources import Loaded, ModelSource, pick_device
from sparsify.recovery.teacher import dense_copy
from sparsify.runs import console


@dataclass
class Bench:
    """A dense model with what is known of it.

    Attributes:
        loaded: model and tokenizer.
        view: its blocks.
        memo: what allocators have asked about it.
    """

    loaded: Loaded
    view: BlockView
    memo: dict[Hashable, Any] = field(default_factory=dict)
    _inputs: dict[str, Inputs] = field(default_factory=dict)

    @cached_property
    def dense(self) -> DenseModel:
        """The one copy of the dense model."""
        return self.view.snapshot()

    def restore(self) -> None:
        """Make the model dense, whatever the last cell did to it."""
        self.view.restore(self.dense)

    def inputs(self, text: Windows | Samples | Mixture | Generated, seed: int) -> Inputs:
        """Inputs of a spec, made once per process; what the model writes, the dense one does."""
        name = f"{text!r}:{seed}"
        if name not in self._inputs:
            self._inputs[name] = self._made(text, seed)
        return self._inputs[name]

    def _made(self, text: Windows | Samples | Mixture | Generated, seed: int) -> Inputs:
        if isinstance(text, Generated) or (isinstance(text, Mixture) and text.reads_model):
            with console.status("the dense model writes text to train on"):
                return text.inputs(self.loaded.tokenizer, seed, dense_copy(self.view, self.dense))
        return text.inputs(self.loaded.tokenizer, seed)

    def subject(self, cell: Cell) -> Subject:
        """The model as it stands, for the evaluators."""
        seed, batch_size = cell.config["seed"], cell.config["batch_size"]
        return Subject(
            self.view, self.loaded.tokenizer, lambda windows: self.inputs(windows, seed), self.dense, batch_size
        )


def bench_of(cell: Cell) -> Bench:
    """The bench for a cell's model: the one of the cell before it, if that had the same."""
    config = cell.config
    model = json.dumps(config["model"], sort_keys=True, default=str)
    return _bench(_Source(cell.source, model), config.get("part"), config["dtype"], pick_device(config["device"]))


@dataclass(frozen=True)
class _Source:
    """A model source that is told from others by its config."""

    source: ModelSource = field(compare=False)
    config: str = ""


@lru_cache(maxsize=1)
def _bench(model: _Source, part: str | None, dtype: str, device: str) -> Bench:
    with console.status(f"loading {model.source.name} ({dtype}, {device})"):
        loaded = model.source.load(dtype, device)
    bench = Bench(loaded, BlockView(loaded.model, part))
    _ = bench.dense  # before anything is changed
    return bench
