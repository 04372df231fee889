"""The model a cell leaves behind (`keep=true`): what pruning changed, with masks and grids, in one safetensors file.

Tensors have their names of the model, and smaller shapes where heads or channels were removed. A mask is
`mask/<layer>`: one bit a weight, row by row, the first in the lowest bit of its byte. The grid of a quantised layer is
`grid/<layer>/...` (`quantisation.stored`).
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.cells import recording
from sparsify.cells.bench import Bench
from sparsify.cells.cell import Cell
from sparsify.cells.clock import Clock
from sparsify.errors import RecordError, SparsifyError, UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.dense import DenseModel
from sparsify.model.masks import Masks
from sparsify.model.removal import shrink
from sparsify.model.sizes import follow
from sparsify.quantisation.grid import Grid
from sparsify.quantisation.stored import GRID, tensors_of
from sparsify.runs.content import sha256
from sparsify.runs.record import Kept, Record

FILE, MASK = "weights.safetensors", "mask/"


def reloaded(cell: Cell, bench: Bench, clock: Clock) -> Record | None:
    """Make the dense model the one that was kept, instead of pruning again; None where none was.

    Returns:
        The record, with the evaluations that it has.
    """
    old, folder = cell.store.read(cell.key), cell.folder
    if old is None or old.kept is None or not intact(folder, old.kept):
        return None
    with clock.timing("reload", bench.view.device):
        load(folder, old.kept, bench.view)
    record = replace(old, status="running", seconds=old.seconds | clock.seconds)
    record = recording.with_earlier(record, cell, old)
    cell.store.write(record)
    return record


def save(
    folder: Path, view: BlockView, dense: DenseModel, masks: Masks, grids: Mapping[str, Grid] | None = None
) -> Kept:
    """Write whatever differs from the dense model.

    Raises:
        SparsifyError: a stage left other modules than it found.
        RecordError: the file could not be written.
    """
    try:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in dense.changed().items()}
    except KeyError as error:
        raise SparsifyError(
            "A stage after pruning left the model with other parameters", got=error, fix="merge them before it returns"
        ) from error
    tensors |= {f"{MASK}{name}": bits for name, bits in masks.bits().items()} | tensors_of(grids or {})
    draft = folder / f".{FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={"format": "pt"})
        os.replace(draft, folder / FILE)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RecordError(
            "The pruned weights could not be written",
            got=f"{folder / FILE}: {error}",
            fix="free some space, set results=<other folder>, or leave out keep=true",
        ) from error
    return Kept(FILE, sha256(folder / FILE), (folder / FILE).stat().st_size)


def intact(folder: Path, kept: Kept | None) -> bool:
    """Whether the file is there and is the one that the record means."""
    file = folder / kept.file if kept else None
    return file is not None and kept is not None and file.is_file() and sha256(file) == kept.sha256


@torch.no_grad()
def load(folder: Path, kept: Kept, view: BlockView) -> Masks:
    """Make a dense model the one that was kept.

    Raises:
        RecordError: the file is not for this model.
    """
    masks = Masks()
    with safe_open(folder / kept.file, "pt") as file:
        names = list(file.keys())
        _resize(
            view, {name: tuple(file.get_slice(name).get_shape()) for name in names if not name.startswith((MASK, GRID))}
        )
        there = dict([*view.model.named_parameters(), *view.model.named_buffers()])
        shapes = {layer.spec.name: layer.weight.shape for layer in view.layers}
        for name in names:
            if name.startswith(MASK):
                layer = name.removeprefix(MASK)
                masks.put(layer, file.get_tensor(name), shapes[layer])
            elif not name.startswith(GRID):
                _write(there, name, file.get_tensor(name), folder / kept.file)
    return masks


def _resize(view: BlockView, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Remove heads and channels until the model has these sizes; what cannot be is refused when it is written."""
    with suppress(UnsupportedModelError):
        if shrink(view, shapes):
            follow(view)


def _write(there: dict[str, Tensor], name: str, tensor: Tensor, file: Path) -> None:
    if name not in there or there[name].shape != tensor.shape:
        raise RecordError("Kept weights do not fit the model", got=f"{name} of {file}", fix=f"remove {file}")
    there[name].copy_(tensor)
