"""Where things lie: configs beside the package, downloaded assets, evaluation data, caches. No torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The repository (or, for an installed wheel, the package) that holds `configs/` and `experiments/`."""
    return PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent


def configs() -> Path:
    """The Hydra configs."""
    return root() / "configs"


def assets() -> Path:
    """Packages that are data to us; `make setup` fills it."""
    return Path(os.environ.get("SPARSIFY_ASSETS", root() / "assets"))


def caches() -> list[Path]:
    """Where converted weights and rows may lie: SPARSIFY_CACHE alone, or beside the assets and in the user's own."""
    if own := os.environ.get("SPARSIFY_CACHE"):
        return [Path(own)]
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [assets() / "cache", users / "sparsify"]


def cache() -> Path:
    """Where they are written: the first place that can be, as the assets may be another user's."""
    return next((place for place in caches() if _writable(place)), caches()[0])


def _writable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, can be written to."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    return there is not None and os.access(there, os.W_OK | os.X_OK)


def data() -> Path | None:
    """The folder of evaluation sets, if the user has one."""
    value = os.environ.get("SPARSIFY_DATA")
    return Path(value) if value else None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No retry lines of the hub client: whether it was reached is our message to give."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
