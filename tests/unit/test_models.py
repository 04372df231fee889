import hashlib
import json
import os
import shutil
from itertools import pairwise

import pytest

from sparsify import paths
from sparsify.errors import DataError, SparsifyError
from sparsify.model import sources as models
from sparsify.model.sources import GGUFModel
from sparsify.runs import registry

CONTENT = b"GGUF, as far as these tests go"


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_ASSETS", str(tmp_path))
    monkeypatch.delenv("SPARSIFY_CACHE", raising=False)


@pytest.fixture
def converted(monkeypatch):
    """Instead of a conversion the file as it is, and what was converted."""
    seen = []

    def copy(source, folder):
        seen.append(source.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(seen[-1])

    monkeypatch.setattr(models, "_dequantise", copy)
    return seen


def source(*contents):
    """A model whose file is in as many parts, all installed."""
    names = [f"package{i}/part{i}" for i in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        (paths.assets() / name).parent.mkdir(exist_ok=True)
        (paths.assets() / name).write_bytes(content)
    file = names[0] if len(names) == 1 else names
    return GGUFModel("some", file, hashlib.sha256(CONTENT).hexdigest(), "some==1", setup="make some")


@pytest.mark.parametrize("cuts", [[], [7], [0, 4, 20]], ids=["whole", "two parts", "four parts"])
def test_parts_are_joined_in_order_and_only_the_conversion_is_kept(converted, cuts):
    places = [0, *cuts, len(CONTENT)]
    model = source(*(CONTENT[a:b] for a, b in pairwise(places)))
    folder = model._converted()
    assert converted == [CONTENT]
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "converted.json"}
    assert json.loads((folder / "converted.json").read_text())["from"] == model.sha256
    assert {file.name for file in paths.cache().iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_conversion_is_done_once_and_again_when_its_weights_have_changed(converted):
    model = source(CONTENT[:9], CONTENT[9:])
    folder = model._converted()
    assert model._converted() == folder
    assert len(converted) == 1
    (folder / "model.safetensors").write_bytes(b"half of it")
    with pytest.warns(UserWarning, match="is damaged"):
        model._converted()
    assert len(converted) == 2
    assert (folder / "model.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["{", "[]", '{"sha256": 3}', None], ids=["cut", "list", "wrong type", "tokenizer"])
def test_a_damaged_conversion_is_named_and_made_again(converted, damage):
    model = source(CONTENT)
    folder = model._converted()
    (folder / ("converted.json" if damage else "tokenizer.json")).write_text(damage or "{")
    with pytest.warns(UserWarning, match="is damaged; converting it again"):
        assert model._converted() == folder
    assert model._converted() == folder
    assert len(converted) == 2


def test_what_killed_conversions_left_is_swept_but_not_what_others_are_at(converted):
    model = source(CONTENT)
    name = f"{model.name}-{model.sha256[:12]}"
    mine, other = (paths.cache() / f".converting-{x}.abc" for x in (name, f"{name}0"))
    for left in (mine, other):
        left.mkdir(parents=True)
    model._converted()
    assert not mine.exists()
    assert other.exists()


def test_a_read_only_installation_of_another_user_is_used_and_never_written(converted, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    model = source(CONTENT)
    writable = os.access
    monkeypatch.setattr(
        paths.os, "access", lambda place, mode: (tmp_path / "home") in [place, *place.parents] and writable(place, mode)
    )
    (tmp_path / "home").mkdir()
    folder = model._converted()
    assert folder.parent == tmp_path / "home/sparsify"
    assert not (tmp_path / "cache").exists()
    shutil.move(folder, tmp_path / "cache" / folder.name)  # installed by somebody with its conversion
    shutil.rmtree(tmp_path / "home/sparsify")
    assert model._converted() == tmp_path / "cache" / folder.name
    assert not (tmp_path / "home/sparsify").exists()
    assert len(converted) == 1


@pytest.mark.parametrize("contents", [(CONTENT + b".",), (CONTENT[9:], CONTENT[:9])], ids=["another", "out of order"])
def test_another_file_is_refused_before_it_is_converted(converted, contents):
    with pytest.raises(DataError, match=r"part0 is not the pinned file.*sha256.*make some \(some==1\)"):
        source(*contents)._converted()
    assert not converted


def test_a_missing_part_is_named(converted):
    model = source(CONTENT[:9], CONTENT[9:])
    (paths.assets() / "package1/part1").unlink()
    with pytest.raises(DataError, match=r"some are not installed.*package1/part1\. Fix: make some\."):
        model._converted()


def test_a_full_disk_leaves_nothing_behind(monkeypatch):
    def fail(source, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "_dequantise", fail)
    with pytest.raises(SparsifyError, match=r"No space left on device.*SPARSIFY_CACHE"):
        source(CONTENT[:9], CONTENT[9:])._converted()
    assert all(file.suffix == ".lock" for file in paths.cache().iterdir())


@pytest.mark.parametrize(("name", "fix"), [("gemma3-270m", "make gemma"), ("smollm2-135m", "make setup")])
def test_weights_that_are_not_installed_are_one_clear_error(name, fix):
    with pytest.raises(DataError) as refused:
        registry.build("model", name).load("float32", "cpu")
    assert refused.value.what == f"The weights of {name} are not installed"
    assert str(refused.value.got).startswith(f"no file {paths.assets()}")
    assert refused.value.fix == fix
