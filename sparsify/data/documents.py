"""The documents of a file as people have them: text, JSON lines, a JSON array, Parquet; plain or gzipped. No torch."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import DataError

JSON = (".json", ".jsonl", ".ndjson")
ROWS = (*JSON, ".parquet")
"""Endings of files that have rows; each of them also with `.gz`."""


def read(file: Path, columns: Sequence[str]) -> Iterator[str]:
    """Documents of one file, by its ending.

    Args:
        file: `.json`, `.jsonl`, `.ndjson`, `.parquet`, `.raw` (WikiText's release), anything else as one document; each
            of them also with `.gz`.
        columns: of a row that make a document.

    Raises:
        DataError: the file is damaged, in another encoding, or has no such column; the message names it.
    """
    if _is(file, ROWS):
        return _joined(_columns(file, columns))
    text = _text(file)
    return _wikitext_rows(text) if _is(file, (".raw",)) else iter([text.replace("\r\n", "\n").replace("\r", "\n")])


def rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of one file, each with its place in it: `line 7` of JSON lines, `row 7` of a JSON array or Parquet.

    Args:
        file: one of the endings of `ROWS`, also with `.gz`.
        columns: that a row must have; null is an empty text.

    Raises:
        DataError: as for `read`, or the file has no rows.
    """
    if not _is(file, ROWS):
        raise DataError(
            "This file has no rows",
            got=file,
            allowed=f"{', '.join(ROWS)}, also with .gz",
            fix="one JSON object a line, or windows of the text instead of samples",
        )
    for place, values in _columns(file, columns):
        yield place, {column: value or "" for column, value in values.items()}


def _is(file: Path, endings: tuple[str, ...]) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(endings)


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


def _columns(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Place and columns of every row."""
    found = _parquet(file, columns) if _is(file, (".parquet",)) else _json(_text(file), file)
    for place, row in found:
        yield place, _values(row, columns, f"{file}, {place}")


def _json(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines, or of a whole file that is an array."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError("This file is no JSON", got=f"{file}: {error}", allowed="an array of rows") from error
        yield from _numbered(found)
        return
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                "A line of this file is no JSON",
                got=f"{file}, line {number}: {error.msg}",
                allowed="one row a line, or an array of rows",
            ) from error


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(file).names
        if missing := [column for column in columns if column not in there]:
            raise _no_column(str(file), missing[0], there)
        found: list[Any] = pq.read_table(file, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("This file is no Parquet", got=f"{file}: {error}", fix="download it again") from error
    return _numbered(found)


def _numbered(found: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(found, start=1))


def _values(row: Any, columns: Sequence[str], where: str) -> dict[str, str | None]:
    """The columns of a row, texts or null; an array may have bare texts as rows."""
    if isinstance(row, str) and tuple(columns) == ("text",):
        return {"text": row}
    if not isinstance(row, Mapping):
        raise DataError("A row of this file is no object", got=f"{where}: {str(row)[:60]}", allowed='{"text": "..."}')
    if missing := [column for column in columns if column not in row]:
        raise _no_column(where, missing[0], [str(key) for key in row])
    values = {column: row[column] for column in columns}
    if odd := [value for value in values.values() if value is not None and not isinstance(value, str)]:
        raise DataError("A column of this file holds no text", got=f"{where}: {str(odd[0])[:60]}", allowed="strings")
    return values


def _joined(rows: Iterator[tuple[str, dict[str, str | None]]]) -> Iterator[str]:
    """A document per row: its columns, joined by line breaks. Rows without any text are left out."""
    for _, values in rows:
        texts = [text for text in values.values() if text is not None]
        if texts:
            yield "\n".join(text for text in texts if text or len(values) == 1)


def _no_column(where: str, column: str, there: Sequence[str]) -> DataError:
    return DataError(
        "This file has no such column",
        got=f"{column} of {where}",
        allowed=", ".join(there),
        fix=f"calibration.text.columns=[{there[0] if there else 'name'}] (also heldout.text, test.text, "
        "tuning.text), or sparsify.windows(..., text_column=...)",
    )


def _wikitext_rows(text: str) -> Iterator[str]:
    """The rows of the hub data set from the release's raw file: a lone space is an empty row."""
    lines = text.removesuffix("\n").split("\n")
    return ("" if line == " " else line + "\n" for line in lines)
