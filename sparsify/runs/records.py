"""The record store: one folder per cell, written atomically, held by a lease while a process works on it. No torch."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sparsify.errors import DamagedError, RecordError
from sparsify.runs import console, leases
from sparsify.runs.record import Record

State = Literal["done", "running", "failed", "missing"]


class Store:
    """Records under `<results>/runs/<key>/record.json`.

    Args:
        results: the results folder.
    """

    def __init__(self, results: str | Path) -> None:
        self.runs = Path(results) / "runs"

    def folder(self, key: str) -> Path:
        return self.runs / key

    def read(self, key: str) -> Record | None:
        """The record, or None if there is none.

        Raises:
            DamagedError: the file is not a record.
            RecordError: it cannot be opened, or a later version wrote it.
        """
        file = self.folder(key) / "record.json"
        try:
            return Record.from_json(json.loads(file.read_text(encoding="utf8")), file.name)
        except FileNotFoundError:
            return None
        except (IsADirectoryError, ValueError, RecursionError) as error:
            fix = f"run the cell again: {file.name} is set aside then, not removed"
            raise DamagedError("A record is damaged", got=f"{file}: {error}", fix=fix) from error
        except OSError as error:
            got = f"{file}: {error.strerror}"
            raise RecordError("A record cannot be read", got=got, fix="make it readable for this user") from error

    def known(self, key: str) -> Record | None:
        """The record, or None if there is none that can be read: one bad file is named once and stops nothing else."""
        try:
            return self.read(key)
        except RecordError as error:
            _name_once(error.paragraph())
            return None

    def write(self, record: Record) -> Path:
        """Write the record so that a reader sees the old one or the new one, never half of it.

        Raises:
            RecordError: the disk is full or not writable; the old record is untouched.
        """
        file = self.folder(record.key) / "record.json"
        try:
            text = json.dumps(record.to_json(), indent=1, allow_nan=False)
        except (ValueError, TypeError) as error:
            where = _not_plain(record.to_json()) or str(error)
            raise RecordError("A result is not finite or not plain data", got=where, allowed="JSON") from error
        write_atomically(file, text)
        return file

    def __iter__(self) -> Iterator[Record]:
        """All records, in order of key."""
        for folder in sorted(self.runs.glob("*/")):
            record = self.known(folder.name)
            if record is not None:
                yield record

    def state(self, key: str, evaluations: Mapping[str, str], *, kept: bool = False) -> State:
        """What is known of a cell that should have these evaluations (name -> key), and its model if it is kept."""
        if self.holder(key) is not None:
            return "running"
        if self.complete(key, evaluations, kept=kept):
            return "done"
        record = self.known(key)
        return "failed" if record is not None and record.status == "failed" else "missing"

    def complete(self, key: str, evaluations: Mapping[str, str], *, kept: bool = False) -> bool:
        """Whether the record is finished and has every one of these evaluations (and the model, if it is kept)."""
        record = self.known(key)
        if record is None or record.status != "done":
            return False
        if kept and (record.kept is None or not (self.folder(key) / record.kept.file).is_file()):
            return False
        return set(evaluations.values()) <= {item.key for item in record.evaluations.values()}

    def holder(self, key: str) -> str | None:
        """`host:pid` of the process that works on the cell, None if nobody alive does."""
        return leases.holder(self.folder(key) / "lease")

    @contextmanager
    def lease(self, key: str) -> Iterator[None]:
        """Hold the cell; a dead process' lease is taken over, what it left half-written is removed, and what is damaged
        is set aside.

        Raises:
            HeldError: another process holds it.
            RecordError: the folder cannot be written.
        """
        with leases.held(self.folder(key) / "lease"):
            _sweep_drafts(self.folder(key))
            self._set_damaged_aside(key)
            yield

    def _set_damaged_aside(self, key: str) -> None:
        try:
            self.read(key)
        except DamagedError:
            file = self.folder(key) / "record.json"
            console.warn(f"a damaged record was set aside as {set_aside(file)}; the cell is run anew")


@cache
def _name_once(text: str) -> None:
    console.warn(text)


def set_aside(file: Path) -> Path:
    """Rename a file that is damaged but may hold results, and say how it is called now."""
    names = (file.with_name(f"{file.stem}.damaged{number}{file.suffix}") for number in ("", *range(2, 100)))
    aside = next(name for name in names if not name.exists())
    os.replace(file, aside)
    return aside


def _not_plain(tree: Any, path: str = "") -> str | None:
    """Where in a tree something is that JSON cannot hold, and what."""
    if isinstance(tree, Mapping | list):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return next((found for key, value in items if (found := _not_plain(value, f"{path}.{key}"))), None)
    fine = tree is None or isinstance(tree, str | bool | int) or (isinstance(tree, float) and math.isfinite(tree))
    return None if fine else f"{path.removeprefix('.')}: {tree!r}"[:200]


def _sweep_drafts(folder: Path) -> None:
    """Remove what killed writers left; a fresh draft of a lease is of somebody who is about to try and take it."""
    for draft in folder.glob(".*.*"):
        with suppress(OSError):
            taking = draft.name.startswith(".lease.") and time.time() - draft.stat().st_mtime < 60
            if draft.suffix[1:].isdigit() and not taking:
                draft.unlink()


def write_atomically(file: Path, text: str) -> None:
    """Write a text file through a temporary sibling and a rename.

    Raises:
        RecordError: it could not be written; what was there before is untouched.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "w", encoding="utf8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise RecordError(
            f"{file.name} could not be written",
            got=f"{file}: {error.strerror or error}",
            allowed="a writable folder with free space",
            fix="free some space or set results=<other folder>; everything finished so far is safe",
        ) from error
