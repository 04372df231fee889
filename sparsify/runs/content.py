"""Hashes of files by their whole content, remembered for as long as the file is the same one. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from sparsify import paths

READ = (".json", ".safetensors", ".bin", ".model", ".txt")
"""What a model's folder is read for: configs, tokenizers and weights."""

_known: dict[str, str] = {}


def folder_hash(folder: Path) -> str:
    """40 hexadecimal digits of the names and the contents of a model's files, wherever links lead.

    The first look reads every byte; later ones, by any process, cost a `stat` a file.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in READ and file.is_file())
    total = hashlib.sha256("".join(f"{file.name}:{file_hash(file)}\n" for file in files).encode())
    return total.hexdigest()[:40]


def file_hash(file: Path) -> str:
    """`sha256`, remembered while the file is the same one."""
    mark = _mark(file)
    if mark not in _known:
        _known.update(_read_cache())
    if mark not in _known:
        _known[mark] = sha256(file)
        _write_cache()
    return _known[mark]


def sha256(file: Path) -> str:
    """Of a file's content, read now."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _mark(file: Path) -> str:
    """What changes whenever a file's content does: it cannot be written to without a new time of change."""
    state = file.stat()
    return f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}|{state.st_dev}:{state.st_ino}"


def _cache_file() -> Path:
    return paths.cache() / "hashes.json"


def _read_cache() -> dict[str, str]:
    try:
        tree = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}  # a cache that is gone or damaged is made anew
    return {str(mark): str(value) for mark, value in tree.items()} if isinstance(tree, dict) else {}


def _write_cache() -> None:
    """Keep what is known of files that still are as they were; where nothing can be written, hash again next time."""
    with contextlib.suppress(OSError):
        place = _cache_file()
        place.parent.mkdir(parents=True, exist_ok=True)
        kept = {mark: value for mark, value in (_read_cache() | _known).items() if _is_current(mark)}
        descriptor, draft = tempfile.mkstemp(dir=place.parent, prefix=".hashes-")
        with os.fdopen(descriptor, "w") as handle:
            json.dump(kept, handle)
        os.replace(draft, place)


def _is_current(mark: str) -> bool:
    file = Path(mark.split("|", 1)[0])
    return file.is_file() and _mark(file) == mark
