"""A kept model as a folder that transformers opens (or `sparsify.load` alone), with a card and the allocation."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from sparsify.cells import card, kept
from sparsify.errors import SparsifyError
from sparsify.model.blocks import BlockView
from sparsify.model.pretrained import quiet
from sparsify.quantisation.grid import check_on_grids
from sparsify.quantisation.stored import grids_in, tensors_of
from sparsify.runs import registry
from sparsify.runs.record import Record
from sparsify.runs.records import Store

ALLOCATION, GRIDS = "allocation.json", "quantisation.safetensors"


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        sparsity: of the record.
        weights: prunable ones of the dense model.
        removed: those of them that are gone with heads and channels.
        own_format: why plain transformers does not open it; None where it does.
    """

    sparsity: float
    weights: int
    removed: int
    own_format: str | None


def export(store: Store, key: str, to: Path) -> Exported:
    """Write model, tokenizer, generation config, card, allocation and grids.

    Raises:
        SparsifyError: there is no such cell, its model was not kept or is not the record's, or `to` is not empty.
    """
    record = _record(store, key)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise SparsifyError("The folder is not empty", got=to, fix="--to <a new folder>")
    if not kept.intact(store.folder(record.key), record.kept):
        raise SparsifyError(
            "The model of this cell was not kept",
            got=f"{record.key}: {'weights.safetensors is damaged or gone' if record.kept else 'no weights'}",
            fix=f"python -m sparsify {record.execution.get('command', '')} keep=true".replace("  ", " "),
        )
    loaded = registry.make(record.execution["model"]).load(record.science["dtype"], "cpu")
    view = BlockView(loaded.model, record.science.get("part"))
    assert record.kept is not None
    kept.load(store.folder(record.key), record.kept, view).check(view)
    grids = grids_in(store.folder(record.key) / record.kept.file)
    check_on_grids(view, grids)
    if view.sparsity() != record.sparsity:
        raise SparsifyError(
            "The kept model has other zeros than the record", got=f"{view.sparsity()} of {record.sparsity}"
        )
    to.mkdir(parents=True, exist_ok=True)
    with quiet():
        loaded.model.save_pretrained(to)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(to)
    (to / ALLOCATION).write_text(json.dumps(allocation(record), indent=1) + "\n", encoding="utf8")
    if grids:
        save_file(tensors_of(grids), to / GRIDS)
    (to / "README.md").write_text(card.text(record), encoding="utf8")
    return Exported(view.sparsity(), view.numel, view.numel - view.table.numel, record.notes.get("own_format"))


def _record(store: Store, key: str) -> Record:
    """The record of a key, or of the beginning of one."""
    matches = [folder.name for folder in store.runs.glob(f"{key}*/")] if key else []
    record = store.read(matches[0]) if len(matches) == 1 else None
    if record is None or record.status == "failed":
        known = sorted(record.key for record in store if record.kept)
        raise SparsifyError(
            "There is no finished cell of that key" if len(matches) < 2 else "Several cells begin like this",
            got=key,
            allowed=", ".join(known) or "a key of a cell that was run with keep=true",
            fix="the key is the name of the cell's folder under <results>/runs, and in the last lines of the run",
        )
    return record


def allocation(record: Record) -> dict[str, object]:
    """Sparsity of every layer, as `allocator=from_file` reads it."""
    return {
        "model": record.science["model"]["name"],
        "sparsity": record.science["sparsity"],
        "pattern": record.science["pattern"],
        "layers": {row["name"]: row["sparsity"] for row in record.plan},
    }
