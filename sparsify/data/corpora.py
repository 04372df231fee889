"""Texts and where to find them: SPARSIFY_DATA, then assets, then the hub. No torch and no tokenizer here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from sparsify import paths
from sparsify.data.documents import read as documents_of
from sparsify.data.documents import rows as rows_of
from sparsify.errors import DataError, UsageError


@dataclass(frozen=True)
class HubFiles:
    """Files of a hub data set at a pinned revision, by split."""

    id: str
    revision: str
    splits: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """A named text with splits.

    Attributes:
        name: short name; protocol tags and records show it.
        splits: split -> glob patterns below SPARSIFY_DATA or assets.
        hub: where the hub has it.
        path: a file or glob of the user's own; replaces the search and serves every split.
        columns: of a row of JSON or Parquet that make a document, joined by line breaks; empty ones are left out.
    """

    name: str
    splits: Mapping[str, list[str]] = field(default_factory=dict)
    hub: HubFiles | None = None
    path: str | None = None
    columns: tuple[str, ...] | list[str] = ("text",)

    def __post_init__(self) -> None:
        if not self.columns or not all(isinstance(column, str) for column in self.columns):
            raise UsageError(
                "A row has at least one column of text", got=f"columns={list(self.columns)}", fix="columns=[text]"
            )
        if self.path is not None and not self.path.strip():
            raise UsageError("path is a file, or a glob of files", got=repr(self.path), fix="path=<file>")

    def texts(self, split: str) -> list[str]:
        """All documents of a split, in order.

        Raises:
            DataError: the split is nowhere, or holds no text.
        """
        documents = [text for file in self._files(split) for text in documents_of(file, list(self.columns))]
        if not any(text.strip() for text in documents):
            raise DataError(f"The {split} split of {self.name} is empty", got=f"{len(documents)} documents")
        return documents

    def rows(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        """The rows of a split in order, each with where it stands (`<file>, line 7`) and its columns.

        Raises:
            DataError: the split is nowhere, or a file of it has no rows or a broken one.
        """
        for file in self._files(split):
            for place, values in rows_of(file, list(self.columns)):
                yield f"{file}, {place}", values

    def fingerprint(self, split: str) -> dict[str, str]:
        """What identifies the text without reading a machine path: local content hash, or hub revision."""
        found = self._local(split)
        columns = {} if tuple(self.columns) == ("text",) else {"columns": ",".join(self.columns)}
        if found:
            place, files = found
            return {"corpus": self.name, "split": split, "source": place, "sha256": _hash_files(tuple(files))} | columns
        if self.hub is not None and split in self.hub.splits:
            return {"corpus": self.name, "split": split, "source": f"{self.hub.id}@{self.hub.revision}"} | columns
        raise self._nowhere(split)

    def _files(self, split: str) -> list[Path]:
        found = self._local(split)
        return found[1] if found else self._download(split)

    def _local(self, split: str) -> tuple[str, list[Path]] | None:
        if self.path is not None:
            return "file", self._of_path(Path(self.path).expanduser())
        for place, folder in (("SPARSIFY_DATA", paths.data()), ("assets", paths.assets())):
            files = _glob(folder, self.splits.get(split, [])) if folder else []
            if files:
                return place, files
        return None

    def _of_path(self, path: Path) -> list[Path]:
        """The file, if there is one of that very name; else the files of the glob."""
        if path.is_dir():
            raise DataError(
                "A text is a file or a glob of files, and this is a folder",
                got=path,
                fix=f"{path}/*.txt, say, in quotes",
            )
        files = [path] if path.is_file() else [file for file in _glob(Path(), [str(path)]) if file.is_file()]
        if not files:
            raise DataError("The text file does not exist", got=self.path, fix="give an existing file or glob")
        return files

    def _download(self, split: str) -> list[Path]:
        if self.hub is None or split not in self.hub.splits:
            raise self._nowhere(split)
        from huggingface_hub import hf_hub_download

        try:
            with paths.quiet_hub():
                return [
                    Path(hf_hub_download(self.hub.id, name, repo_type="dataset", revision=self.hub.revision))
                    for name in self.hub.splits[split]
                ]
        except Exception as error:
            raise self._nowhere(split) from error

    def _nowhere(self, split: str) -> DataError:
        data = paths.data()
        hub = f"the hub ({self.hub.id})" if self.hub else "no hub data set"
        splits = sorted(set(self.splits) | set(self.hub.splits if self.hub else {}))
        return DataError(
            f"The text {self.name} ({split} split) is nowhere to be found",
            got=f"looked in SPARSIFY_DATA ({data or 'not set'}), in assets ({paths.assets()}) and at {hub}",
            allowed=f"splits {splits}",
            fix="make setup for the embedded text, SPARSIFY_DATA=<folder> for your copy, or a machine that reaches "
            "the hub",
        )


def _glob(folder: Path | None, patterns: list[str]) -> list[Path]:
    """Files of each pattern in turn, sorted within a pattern."""
    if folder is None:
        return []
    files: list[Path] = []
    for pattern in patterns:
        full = Path(folder / pattern)
        anchor = Path(full.anchor) if full.is_absolute() else Path()
        files += sorted(anchor.glob(str(full.relative_to(anchor))))
    return files


@cache
def _hash_files(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
