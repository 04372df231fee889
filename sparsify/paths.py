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


def cache() -> Path:
    """Converted checkpoints."""
    return Path(os.environ.get("SPARSIFY_CACHE", assets() / "cache"))


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
