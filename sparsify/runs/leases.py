"""Leases: a file that says which process works on a cell, taken over when that process is dead. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sparsify.errors import HeldError, RecordError

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0
"""A lease of another host is dead when its heartbeat is further from now than this."""
WRITING_SECONDS = 60.0
"""A lease that cannot be read is one that is being written, if it is not older."""
NO_LINKS = (errno.ENOSYS, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL, errno.EXDEV)


def holder(file: Path) -> str | None:
    """`host:pid` of the living process that holds a lease; None if nobody does."""
    lease = _read_lease(file)
    if not _alive(file, lease):
        return None
    return f"{lease['host']}:{lease['pid']}" if lease else "a process that is just taking it"


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a lease; its file's time is renewed for as long.

    Raises:
        HeldError: a living process holds it.
        RecordError: the folder cannot be written.
    """
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


def _take(file: Path) -> None:
    draft = file.with_name(f".lease.{socket.gethostname()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep_dead(file)
        draft.write_text(json.dumps(_me()))
        _create(draft, file)
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


def _create(draft: Path, file: Path) -> None:
    """Create the lease with its content in one step, so that nobody reads an empty one.

    Where there are no hard links (exFAT, SMB, gcsfuse) in two: the first to create the file has it, and an empty lease
    counts as a living one for a minute.
    """
    try:
        os.link(draft, file)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(file, "x") as handle:
            handle.write(draft.read_text())


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _sweep_dead(file: Path) -> None:
    """Remove a dead lease; the rename lets only one of several takers win."""
    lease = _read_lease(file)
    if file.exists() and not _alive(file, lease):
        grave = file.with_name(f"lease.dead.{os.getpid()}")
        try:
            os.rename(file, grave)
        except FileNotFoundError:
            return
        if _read_lease(grave) != lease:  # another taker was quicker, and this is its living lease
            with suppress(FileExistsError):
                _create(grave, file)
        with suppress(OSError):
            grave.unlink()


def _read_lease(file: Path) -> dict[str, Any] | None:
    try:
        lease = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    kinds = {"host": str, "pid": int, "started": float | int}
    whole = isinstance(lease, dict) and all(isinstance(lease.get(key), kind) for key, kind in kinds.items())
    return lease if whole else None


def _alive(file: Path, lease: Mapping[str, Any] | None) -> bool:
    """Whether the process lives; of another host, whether its heartbeat (by the file's time) is near to now."""
    if lease is None:
        return _age(file) < WRITING_SECONDS
    if lease["host"] == socket.gethostname():
        try:
            process = psutil.Process(lease["pid"])
            return abs(process.create_time() - lease["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError, OverflowError):  # also what was never the number of a process
            return False
    return _age(file) < STALE_SECONDS


def _age(file: Path) -> float:
    """Seconds between now and the file's time, whichever is first: clocks of hosts differ."""
    try:
        return abs(time.time() - file.stat().st_mtime)
    except OSError:
        return math.inf


def _heartbeat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            os.utime(file)
        except FileNotFoundError:
            return
        except OSError:
            continue  # a network file system may recover
