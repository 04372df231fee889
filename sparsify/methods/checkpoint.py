"""What a long method has got so far, kept so that a killed run goes on where it was."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """One state in a file of the cell's folder; without a folder nothing is kept.

    Args:
        folder: of the cell, or None.
        part: whose state it is, where several keep one in the same folder.
    """

    def __init__(self, folder: Path | None = None, part: str = "") -> None:
        self.folder = folder
        self.file = folder / f"checkpoint{part and '.'}{part}.pt" if folder is not None else None

    def of(self, part: str) -> "Checkpoint":
        """Another one in the same folder, for something inside a method that has a state of its own."""
        return Checkpoint(self.folder, part)

    def load(self) -> Any | None:
        """The last state that was saved, None if there is none; a damaged file is set aside, with a warning."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            return torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the bytes happen to mean
            aside = self.file.with_suffix(".damaged.pt")
            os.replace(self.file, aside)
            warnings.warn(f"a damaged checkpoint was set aside as {aside} ({error}); starting anew", stacklevel=2)
            return None

    def save(self, state: Any) -> None:
        """Replace the state by another one: tensors, numbers, text and containers of them.

        A kill leaves the old one or the new one.
        """
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        torch.save(state, draft)
        os.replace(draft, self.file)

    def clear(self) -> None:
        """Forget it and those of all parts: the work is done and recorded."""
        if self.folder is not None:
            for file in self.folder.glob("checkpoint*.pt"):
                if not file.name.endswith(".damaged.pt"):
                    file.unlink(missing_ok=True)
