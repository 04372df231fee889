"""The documents of a file as people have them: text, JSON lines, a JSON array, Parquet; plain or gzipped. No torch."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import DataError

JSON = (".json", ".jsonl", ".ndjson")


def read(file: Path, columns: Sequence[str]) -> Iterator[str]:
    """Documents of one file, by its ending.

    Args:
        file: `.json`, `.jsonl`, `.ndjson`, `.parquet`, `.raw` (WikiText's release), anything else as one document; each
            of them also with `.gz`.
        columns: of a row that make a document.

    Raises:
        DataError: the file is damaged, in another encoding, or has no such column; the message names it.
    """
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _joined(_parquet(file, columns), columns, file)
    text = _text(file)
    if name.endswith(JSON):
        return _joined(_json(text, file), columns, file)
    return _wikitext_rows(text) if name.endswith(".raw") else iter([text.replace("\r\n", "\n").replace("\r", "\n")])


def _text(file: Path) -> str:
    """The whole text, without a byte-order mark, line ends as they are."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "This file cannot be read", got=f"{file}: {error or type(error).__name__}", fix="download it again"
        ) from error
    if content.startswith(b"version https://git-lfs."):
        raise DataError("This file is a pointer of git-lfs, not the text itself", got=file, fix="git lfs pull")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "This text is not in UTF-8",
            got=f"{file}, byte {error.start}: {content[error.start : error.start + 1]!r}",
            allowed="UTF-8, with or without a byte-order mark",
            fix=f"iconv -f latin1 -t utf8 {file.name} > utf8-{file.name}, if it is Latin-1",
        ) from error


def _json(text: str, file: Path) -> Iterator[Any]:
    """Rows of JSON lines, or of a whole file that is an array."""
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError("This file is no JSON", got=f"{file}: {error}", allowed="an array of rows") from error
        return
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                "A line of this file is no JSON",
                got=f"{file}, line {number}: {error.msg}",
                allowed="one row a line, or an array of rows",
            ) from error


def _parquet(file: Path, columns: Sequence[str]) -> Iterable[Any]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(file).names
        if missing := [column for column in columns if column not in there]:
            raise _no_column(file, missing[0], there)
        rows: list[Any] = pq.read_table(file, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("This file is no Parquet", got=f"{file}: {error}", fix="download it again") from error
    return rows


def _joined(rows: Iterable[Any], columns: Sequence[str], file: Path) -> Iterator[str]:
    """A document per row: its columns, joined by line breaks. Rows without any text are left out."""
    for row in rows:
        if isinstance(row, str) and tuple(columns) == ("text",):
            yield row
            continue
        if not isinstance(row, Mapping):
            raise DataError(
                "A row of this file is no object", got=f"{file}: {str(row)[:60]}", allowed='{"text": "..."}'
            )
        if missing := [column for column in columns if column not in row]:
            raise _no_column(file, missing[0], [str(key) for key in row])
        texts = [row[column] for column in columns if row[column] is not None]
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise DataError("A column of this file holds no text", got=f"{file}: {str(odd[0])[:60]}", allowed="strings")
        if texts:
            yield "\n".join(text for text in texts if text or len(columns) == 1)


def _no_column(file: Path, column: str, there: Sequence[str]) -> DataError:
    return DataError(
        "This file has no such column",
        got=f"{column} of {file}",
        allowed=", ".join(there),
        fix=f"calibration.text.columns=[{there[0] if there else 'name'}] (also heldout.text, test.text), or "
        "sparsify.windows(..., text_column=...)",
    )


def _wikitext_rows(text: str) -> Iterator[str]:
    """The rows of the hub data set from the release's raw file: a lone space is an empty row."""
    lines = text.removesuffix("\n").split("\n")
    return ("" if line == " " else line + "\n" for line in lines)
