"""Where and with what a record was made. No torch import of its own."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

from hydra.core.hydra_config import HydraConfig

from sparsify import paths

PACKAGES = ("torch", "transformers", "numpy", "layerwise-sparsify")


def execution(config: Mapping[str, Any]) -> dict[str, Any]:
    """Commit, versions, device and time; nothing here is part of a run's identity."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(str(config["device"])),
        "batch_size": config["batch_size"],
        "command": command(),
    }


def command() -> str:
    """The overrides that make this very cell, as they are typed."""
    if not HydraConfig.initialized():
        return ""
    overrides = [text for text in HydraConfig.get().overrides.task if not text.startswith("sweep.")]
    return " ".join(shlex.quote(text) for text in overrides)


@cache
def commit() -> str:
    """Hash of the checkout, with `-dirty` if it has changes; SPARSIFY_COMMIT where there is no git."""
    if os.environ.get("SPARSIFY_COMMIT"):
        return os.environ["SPARSIFY_COMMIT"]
    try:
        git = ["git", "-C", str(paths.root())]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


@cache
def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def device_name(wanted: str) -> str:
    """The accelerator's name, or the processor's and how many threads are used."""
    torch = sys.modules.get("torch")
    if torch is not None and wanted != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads() if torch is not None else os.cpu_count()
    return f"{platform.machine()} CPU, {threads} threads"
