"""The record store: one folder per cell, written atomically, held by a lease while a process works on it. No torch."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from sparsify.errors import HeldError, RecordError
from sparsify.runs.record import Record

State = Literal["done", "running", "failed", "missing"]
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0
"""A lease of another host is dead when its heartbeat is older than this."""


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
            RecordError: the file is not a record.
        """
        file = self.folder(key) / "record.json"
        try:
            return Record.from_json(json.loads(file.read_text(encoding="utf8")), file.name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RecordError("A record cannot be read", got=f"{file}: {error}", fix=f"remove {file}") from error

    def write(self, record: Record) -> Path:
        """Write the record so that a reader sees the old one or the new one, never half of it.

        Raises:
            RecordError: the disk is full or not writable; the old record is untouched.
        """
        file = self.folder(record.key) / "record.json"
        try:
            text = json.dumps(record.to_json(), indent=1, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise RecordError("A result is not finite or not plain data", got=error) from error
        write_atomically(file, text)
        return file

    def __iter__(self) -> Iterator[Record]:
        """All records, in order of key."""
        for folder in sorted(self.runs.glob("*/")):
            record = self.read(folder.name)
            if record is not None:
                yield record

    def state(self, key: str, evaluations: Mapping[str, str], *, kept: bool = False) -> State:
        """What is known of a cell that should have these evaluations (name -> key), and its model if it is kept."""
        if self.holder(key) is not None:
            return "running"
        if self.complete(key, evaluations, kept=kept):
            return "done"
        record = self.read(key)
        return "failed" if record is not None and record.status == "failed" else "missing"

    def complete(self, key: str, evaluations: Mapping[str, str], *, kept: bool = False) -> bool:
        """Whether the record is finished and has every one of these evaluations (and the model, if it is kept)."""
        record = self.read(key)
        if record is None or record.status != "done":
            return False
        if kept and (record.kept is None or not (self.folder(key) / record.kept.file).is_file()):
            return False
        return set(evaluations.values()) <= {item.key for item in record.evaluations.values()}

    def holder(self, key: str) -> str | None:
        """`host:pid` of the process that works on the cell, None if nobody alive does."""
        lease = _read_lease(self.folder(key) / "lease")
        return f"{lease['host']}:{lease['pid']}" if lease and _alive(self.folder(key) / "lease", lease) else None

    @contextmanager
    def lease(self, key: str) -> Iterator[None]:
        """Hold the cell; a dead process' lease is taken over.

        Raises:
            RecordError: another process holds it.
        """
        file = self.folder(key) / "lease"
        _take(file)
        stop = threading.Event()
        beat = threading.Thread(target=_heartbeat, args=(file, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            if _read_lease(file) == _me():
                file.unlink(missing_ok=True)


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


def _take(file: Path) -> None:
    """Create the lease with its content in one step, so that nobody ever reads an empty one."""
    draft = file.with_name(f"lease.draft.{socket.gethostname()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep_dead(file)
        draft.write_text(json.dumps(_me()))
        os.link(draft, file)
    except FileExistsError:
        lease = _read_lease(file)
        who = f"{lease['host']}:{lease['pid']}" if lease else "another process"
        raise HeldError(
            "This cell is being worked on", got=f"held by {who}", fix=f"wait for it, or remove {file} if it is dead"
        ) from None
    except OSError as error:
        raise RecordError(
            "The cell's folder cannot be written",
            got=f"{file.parent}: {error.strerror}",
            fix="free some space or set results=<other folder>; everything finished so far is safe",
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _sweep_dead(file: Path) -> None:
    """Remove a dead lease; the rename lets only one of several takers win."""
    lease = _read_lease(file)
    if file.exists() and (lease is None or not _alive(file, lease)):
        grave = file.with_name(f"lease.dead.{os.getpid()}")
        try:
            os.rename(file, grave)
        except FileNotFoundError:
            return
        if _read_lease(grave) != lease:  # another taker was quicker, and this is its living lease
            with suppress(FileExistsError):
                os.link(grave, file)
        grave.unlink()


def _read_lease(file: Path) -> dict[str, Any] | None:
    try:
        lease = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return lease if isinstance(lease, dict) else None


def _alive(file: Path, lease: Mapping[str, Any]) -> bool:
    if lease["host"] == socket.gethostname():
        try:
            process = psutil.Process(lease["pid"])
            return abs(process.create_time() - lease["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
    try:
        return time.time() - file.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False


def _heartbeat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            os.utime(file)
        except FileNotFoundError:
            return
        except OSError:
            continue  # a network file system may recover
