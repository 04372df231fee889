"""A model's folder is what its files hold."""

import os

import pytest

from sparsify.runs import content


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_known", {})
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model-1.safetensors").write_bytes(bytes(3_000_000))
    return place


@pytest.mark.parametrize("byte", [0, 70_000, 1_500_001, 2_999_999])
def test_any_byte_counts(folder, byte):
    before = content.folder_hash(folder)
    with open(folder / "model-1.safetensors", "r+b") as file:
        file.seek(byte)
        file.write(b"\1")
    os.utime(folder / "model-1.safetensors", (1, 1))
    assert content.folder_hash(folder) != before


def test_links_and_shards_count_by_what_they_lead_to(folder, tmp_path):
    before = content.folder_hash(folder)
    blob = tmp_path / "blob"
    (folder / "model-1.safetensors").rename(blob)
    (folder / "model-1.safetensors").symlink_to(blob)
    assert content.folder_hash(folder) == before
    blob.write_bytes(b"\1" * 3_000_000)
    changed = content.folder_hash(folder)
    assert changed != before
    (folder / "model-2.safetensors").write_bytes(b"more")
    assert content.folder_hash(folder) != changed


def test_a_second_look_by_another_process_reads_nothing(folder, monkeypatch):
    before = content.folder_hash(folder)
    monkeypatch.setattr(content, "_known", {})
    monkeypatch.setattr(content.hashlib, "file_digest", None)
    assert content.folder_hash(folder) == before


def test_a_damaged_or_read_only_cache_is_no_matter(folder, monkeypatch):
    before = content.folder_hash(folder)
    (folder.parent / "cache" / "hashes.json").write_text("[half")
    monkeypatch.setattr(content, "_known", {})
    assert content.folder_hash(folder) == before
    monkeypatch.setattr(content, "_known", {})
    monkeypatch.setenv("SPARSIFY_CACHE", "/proc/nowhere")
    assert content.folder_hash(folder) == before
