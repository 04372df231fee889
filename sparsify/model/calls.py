"""How a model calls its blocks: asked once, with the blocks themselves replaced by recorders.

The recorded arguments (masks, rotary embeddings, per layer type) are what a walk calls the blocks with.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.data.inputs import Batch, Inputs
from sparsify.errors import UnsupportedModelError
from sparsify.model.blocks import BlockView

CACHES = ("past_key_values", "past_key_value", "layer_past", "use_cache")
"""Arguments that would make a block remember earlier batches."""

Calls = list[list[dict[str, Any]]]
"""Keyword arguments of every block (inner) for every batch (outer)."""


@torch.no_grad()
def enter(view: BlockView, inputs: Inputs, batches: list[slice]) -> tuple[Float[Tensor, "n seq dim"], Calls]:
    """Hidden states before block 0, and how the model calls each block for each batch.

    Raises:
        UnsupportedModelError: these inputs do not reach every block once.
    """
    tuples = _returns_tuple(view, inputs)
    states: list[Tensor] = []
    calls: Calls = []
    for where in batches:
        with _recording(view, tuples) as (first, seen):
            run_blocks(view, inputs.batch(where, view.device))
        states.append(first[0])
        calls.append(_same_or(calls[0], seen) if calls else seen)
    return torch.cat(states), calls


def run_blocks(view: BlockView, batch: Batch) -> None:
    """The model's own forward, as far as its blocks and what leads to them."""
    view.model.base_model(**batch)  # type: ignore[operator]


@contextmanager
def _recording(view: BlockView, tuples: list[bool]) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Replace every block's forward by a recorder that passes the hidden states through."""
    first: list[Tensor] = []
    seen: list[dict[str, Any]] = [{} for _ in view.blocks]
    states: dict[int, State] = {}

    def state_of(value: Any) -> Any:
        """A dictionary that is empty before any block has run is one that they write into."""
        empty = isinstance(value, MutableMapping) and not value
        return states.setdefault(id(value), State()) if empty else value

    def recorder(i: int, names: list[str]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            hidden = given.pop(names[0])
            if i == 0:
                first.append(hidden)
            seen[i] = {k: state_of(v) for k, v in given.items() if k not in CACHES}
            return (hidden, None) if tuples[i] else hidden

        return forward

    before = [block.__dict__.get("forward") for block in view.blocks]
    names = [list(inspect.signature(block.forward).parameters) for block in view.blocks]
    try:
        for i, block in enumerate(view.blocks):
            block.forward = recorder(i, names[i])
        yield first, seen
    finally:
        for block, old in zip(view.blocks, before, strict=True):
            del block.forward
            if old is not None:
                block.forward = old


def _returns_tuple(view: BlockView, inputs: Inputs) -> list[bool]:
    """Run a few positions through the real model to see which blocks return tuples."""
    kinds: dict[int, bool] = {}
    often = Counter[int]()

    def note(i: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            kinds[i] = isinstance(out, tuple)
            often[i] += 1

        return hook

    handles = [block.register_forward_hook(note(i)) for i, block in enumerate(view.blocks)]
    try:
        run_blocks(view, inputs.probe(view.device))
    finally:
        for handle in handles:
            handle.remove()
    if missed := [i for i in range(len(view.blocks)) if i not in kinds]:
        raise UnsupportedModelError(
            "The inputs do not reach every block that is to be pruned",
            got=f"block {missed[0]} of {len(view.blocks)} was not called",
            fix="part=language for text, or inputs of the part that is pruned",
        )
    if twice := [i for i, count in often.items() if count > 1]:
        raise UnsupportedModelError(
            "The model runs a block more than once, and a walk goes through each once",
            got=f"block {twice[0]}, {often[twice[0]]} times",
        )
    return [kinds[i] for i in range(len(view.blocks))]


def _same_or(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`old` where the arguments are equal (the usual case), so that masks are stored once, not once a batch.

    What blocks write into is of one batch alone.
    """
    known: dict[tuple[int, int], bool] = {}
    return [
        _own(a, b, known) if holds_state(b) else a if _equal(a, b, known) else b for a, b in zip(old, new, strict=True)
    ]


def _own(old: dict[str, Any], new: dict[str, Any], known: dict[tuple[int, int], bool]) -> dict[str, Any]:
    """The new arguments, with those of the old that are equal and are not written into."""
    same = {k: k in old and not _is_state(v) and _equal(old[k], v, known) for k, v in new.items()}
    return {k: old[k] if same[k] else v for k, v in new.items()}


def holds_state(call: Mapping[str, Any]) -> bool:
    """Whether a block is handed an object in which earlier blocks leave something for later ones.

    Such an object comes to the first block empty; `forked` and walks keep one for every batch.
    """
    return any(_is_state(value) for value in call.values())


def _is_state(value: Any) -> bool:
    return isinstance(value, State)


class State(dict[Any, Any]):
    """A dictionary that came empty: blocks write into it."""


def forked(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls of a batch with what blocks write into copied, one copy for all blocks as before."""
    copies: dict[int, State] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), State(value)) if _is_state(value) else value

    return [{key: own(value) for key, value in call.items()} for call in calls]


def _equal(a: Any, b: Any, known: dict[tuple[int, int], bool]) -> bool:
    """Deep equality; tensors that all blocks share are compared once (each comparison waits for the device)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (id(a), id(b)) not in known:
            known[id(a), id(b)] = a.shape == b.shape and bool(torch.equal(a, b))
        return known[id(a), id(b)]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k], known) for k in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y, known) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors inside nested arguments in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if _is_state(value):
        return value  # filled later, by blocks of that dtype; one object for all of them
    if isinstance(value, Mapping):
        return {key: cast(item, dtype) for key, item in value.items()}
    return type(value)(cast(item, dtype) for item in value) if type(value) in (tuple, list) else value
