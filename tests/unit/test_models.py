import hashlib
import json
import os
import shutil
from itertools import pairwise

import pytest

from sparsify import paths
from sparsify.commands.overrides import understood
from sparsify.errors import DataError, SparsifyError, UsageError
from sparsify.model import gguf
from sparsify.model.gguf import GGUFModel
from sparsify.runs import identity, menu, registry

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

    monkeypatch.setattr(gguf, "_dequantise", copy)
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
    with pytest.raises(DataError, match=r"part0.* is not the pinned file.*sha256.*make some \(some==1\)"):
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

    monkeypatch.setattr(gguf, "_dequantise", fail)
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


def test_a_file_of_ones_own_is_converted_by_its_content(converted, tmp_path):
    file = tmp_path / "mine.gguf"
    file.write_bytes(CONTENT)
    model = GGUFModel("mine", str(file))
    folder = model._converted()
    assert folder.name == f"mine-{hashlib.sha256(CONTENT).hexdigest()[:12]}"
    file.write_bytes(CONTENT + b"!")
    assert model._converted() != folder
    assert converted == [CONTENT, CONTENT + b"!"]


@pytest.mark.parametrize("name", ["nowhere.gguf", "org/name/file.gguf"])
def test_a_file_that_is_nowhere_is_one_clear_error(monkeypatch, name):
    import huggingface_hub

    def unreachable(repo, file):
        assert (repo, file) == ("org/name", "file.gguf")
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match=f"no such GGUF file.*{name}"):
        GGUFModel("x", name).load("float32", "cpu")


def test_what_is_no_gguf_is_one_clear_error(tmp_path):
    file = tmp_path / "mine.gguf"
    file.write_bytes(CONTENT)
    with pytest.raises(DataError, match=r"mine\.gguf could not be read"):
        GGUFModel("mine", str(file)).load("float32", "cpu")


def test_the_same_file_is_the_same_model_wherever_it_lies(tmp_path):
    keys = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.gguf").write_bytes(CONTENT)
        keys.append(menu.compose(understood([f"model={tmp_path / place / 'mine.gguf'}"])))
    assert {config["model"]["name"] for config in keys} == {"mine"}
    assert len({json.dumps(identity._model_identity(config["model"])) for config in keys}) == 1
    (tmp_path / "there/mine.gguf").write_bytes(CONTENT + b"!")
    assert len({json.dumps(identity._model_identity(config["model"])) for config in keys}) == 2


def test_a_sweep_over_models_of_two_kinds_is_refused(tmp_path):
    (tmp_path / "mine.gguf").write_bytes(CONTENT)
    with pytest.raises(UsageError, match="one sweep each"):
        understood([f"model={tmp_path / 'mine.gguf'},org/name"])
