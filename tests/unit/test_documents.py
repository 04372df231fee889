"""Texts as people have them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsify.data.corpora import Corpus
from sparsify.errors import DataError

ROWS = [{"text": "one"}, {"text": "two\nlines"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet(column):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: ["one", "two\nlines"]}), sink)
    return sink.getvalue().to_pybytes()


def texts(tmp_path, name, content, columns=("text",)):
    (tmp_path / name).write_bytes(content)
    return Corpus("mine", path=str(tmp_path / name), columns=columns).texts("train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("A.JSONL", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("a.json", LINES.encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", json.dumps([row["text"] for row in ROWS]).encode()),
        ("a.jsonl", ("\ufeff" + LINES).encode()),
        ("a.jsonl", (LINES + "\n\n").encode()),
        ("a.jsonl", (LINES + '{"text": null}\n').encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.parquet", parquet("text")),
    ],
)
def test_rows_are_documents(tmp_path, name, content):
    assert texts(tmp_path, name, content) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"one\r\ntwo"),
        ("a.md", "\ufeffone\ntwo".encode()),
        ("a.txt.gz", gzip.compress(b"one\ntwo", mtime=0)),
        ("notes [draft] = (1).txt", b"one\ntwo"),
    ],
)
def test_anything_else_is_one_document(tmp_path, name, content):
    assert texts(tmp_path, name, content) == ["one\ntwo"]


def test_another_column_is_named_and_can_be_chosen(tmp_path):
    content = LINES.replace('"text"', '"content"').encode()
    with pytest.raises(DataError, match=r"no such column.*Allowed: content.*text_column"):
        texts(tmp_path, "a.jsonl", content)
    assert texts(tmp_path, "a.jsonl", content, ("content",)) == ["one", "two\nlines"]
    with pytest.raises(DataError, match=r"no such column.*Allowed: content"):
        texts(tmp_path, "a.parquet", parquet("content"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "caf\xe9".encode("latin1"), "not in UTF-8.*byte 3.*iconv"),
        ("a.jsonl", LINES.encode() + b'{"text": "ha', "line 3"),
        ("a.json", b'[{"text": "ha', "no JSON"),
        ("a.jsonl", b"[1, 2]", "no object"),
        ("a.jsonl", b'{"text": 5}\n', "no text"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read.*download"),
        ("a.txt.gz", b"plain", "cannot be read"),
        ("a.parquet", b"PAR1", "no Parquet"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.txt", b"", "empty"),
    ],
)
def test_what_cannot_be_read_is_one_paragraph(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said):
        texts(tmp_path, name, content)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(DataError, match=r"folder.*\*\.txt"):
        Corpus("mine", path=str(tmp_path)).texts("train")
