import re
import tomllib
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from sparsify import paths
from sparsify.commands.overrides import expand_model
from sparsify.runs import planning, registry

ROOT = paths.configs().parent
FILES = sorted(paths.configs().rglob("*.yaml"))
GROUPS = {"model": 15, "data": 4, "pruner": 4, "allocator": 13, "method": 1, "eval": 1, "logger": 2, "scale": 2}
OPTIONS = [(group, name) for group in GROUPS for name in registry.names(group)]
EXPERIMENTS = registry.names("experiment")
TABLES = registry.names("table")
SCALES = registry.names("scale")
PLACES = {"data": ("data@calibration.text", "data@heldout.text", "data@test.text", "data@tuning.text")}
GIVEN = {("model", "hub"): ["model.id=org/name"], ("model", "gguf"): ["model.file=org/name/file.gguf"]}
COMMAND = re.compile(r"python -m sparsify(?:\.sweep|\.report|\.plan)?((?: [^\s#&(]+)*)")
MAKE = re.compile(r"\bmake ([a-z]\w*)((?: [A-Z]+=\S+)*)")


@pytest.fixture(autouse=True)
def _hydra():
    with initialize_config_dir(str(paths.configs()), version_base="1.3"):
        yield


def short(file):
    return str(file.relative_to(paths.configs()))


def header(file):
    """The comment at the top, as one text."""
    lines = []
    for line in file.read_text(encoding="utf8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


def values_of(tree, key):
    """Every value of a key, at any depth."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            yield from values_of(child, key)


@cache
def jobs_of(*overrides):
    return planning.grid(list(overrides))


def load(file):
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


@pytest.mark.parametrize(("group", "at_least"), [*GROUPS.items(), ("experiment", 4), ("table", 2)])
def test_files_of_every_group_are_found(group, at_least):
    assert len(registry.names(group)) >= at_least


def test_every_folder_is_a_group_of_the_menu():
    entries = [line for line in load(paths.configs() / "config.yaml")["defaults"] if isinstance(line, dict)]
    keys = [next(iter(line)) for line in entries]
    menu = {re.split("[@ ]", key)[0] for key in keys if not key.startswith(("override ", "optional "))}
    folders = {file.relative_to(paths.configs()).parts[0] for file in FILES} - {"config.yaml", "local"}
    without = {next(iter(line)) for line in entries if None in line.values()}  # stages of which there is none yet
    assert folders | without == menu | {"table", "hydra", "perturbation", "schedule"}


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_resolves(group, name):
    places = PLACES.get(group, [group])
    config = compose("config", [*(f"{place}={name}" for place in places), *GIVEN.get((group, name), [])])
    OmegaConf.resolve(config)
    required = {"file": {"path"}, "from_file": {"file"}}.get(name, set())
    assert {key.split(".")[-1] for key in OmegaConf.missing_keys(config)} == required


@pytest.mark.parametrize("name", [n.removeprefix("launcher/") for n in registry.names("hydra")])
def test_every_launcher_composes_where_its_plugin_is_installed(name):
    if not any("Slurm" in plugin.__name__ for plugin in Plugins.instance().discover(Launcher)):
        pytest.skip("hydra-submitit-launcher is not installed")
    config = compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    assert "Slurm" in config.hydra.launcher._target_


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_expands_to_a_grid_that_composes_at_every_scale(name):
    for scale in SCALES:
        jobs = jobs_of(f"experiment={name}", f"scale={scale}")
        assert len({tuple(job) for job in jobs}) == len(jobs) >= 1
    OmegaConf.resolve(compose("config", jobs[-1]))


@pytest.mark.parametrize("name", TABLES)
def test_every_part_of_a_table_expands_to_a_grid(name):
    table = load(registry.find("table", name))
    assert table["title"]
    assert table["parts"]
    for part in table["parts"]:
        assert jobs_of(*part)
    assert "paper" not in table or (ROOT / table["paper"]).is_file()


@pytest.mark.parametrize("file", FILES, ids=short)
def test_a_file_starts_with_a_command_that_runs(file):
    text = header(file)
    commands, makes = COMMAND.findall(text), MAKE.findall(text)
    assert commands or makes
    for command in commands:
        words = [word for word in command.split() if "=" in word and not word.startswith("table=")]
        assert jobs_of(*expand_model(words))
    for target, _ in makes:
        assert re.search(
            rf"^(?:(?:TABLES|CHECKS) := .*\b{target}\b|{target}:)", (ROOT / "Makefile").read_text(), re.MULTILINE
        )


def test_every_pinned_revision_is_a_whole_commit():
    pinned = {short(file): set(values_of(load(file), "revision")) for file in FILES}
    pinned = {name: found for name, found in pinned.items() if found and name != "model/hub.yaml"}
    assert len(pinned) >= 15
    for name, found in pinned.items():
        for revision in found:
            assert re.fullmatch("[0-9a-f]{40}", str(revision)), name


def test_every_pinned_file_has_a_whole_hash():
    hashes = [value for file in FILES for value in values_of(load(file), "sha256") if value is not None]
    assert hashes
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes)


def test_a_model_is_named_after_its_file():
    names = {name: load(registry.find("model", name))["name"] for name in registry.names("model")}
    del names["hub"], names["gguf"]  # of any file
    assert all(name == shown for name, shown in names.items())


def test_the_wheel_holds_every_package_and_the_configs():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in paths.PACKAGE.rglob("__init__.py")}
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in paths.PACKAGE.rglob("*.py")}
    assert found == folders
    assert set(listed) == found | {"sparsify.configs", "sparsify.experiments"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", registry.names("allocator"))
def test_an_allocator_alone_is_what_hydra_composes(name):
    whole = compose("config", [f"allocator={name}"])
    alone = OmegaConf.merge(whole, {"allocator": registry.composed("allocator", name)})
    resolved = [OmegaConf.to_container(config.allocator, resolve=True) for config in (whole, alone)]
    assert resolved[0] == resolved[1]
    assert set(registry.composed("allocator", name)) == set(whole.allocator)
