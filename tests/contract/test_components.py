"""Every YAML of a component composes, binds to its class and shows every parameter."""

import dataclasses
import inspect

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.runs import registry

GROUPS = {"pruner": 4, "allocator": 13, "method": 1, "eval": 1, "logger": 2, "data": 4, "model": 10}
GROUPS |= {"recovery": 0, "quantiser": 2, "objective": 1}
FILES = [(group, name) for group in GROUPS for name in registry.names(group)]
VERSIONED = ("pruner", "allocator", "method", "eval", "recovery", "quantiser", "objective")
SWEEPS = {("eval", "absorption"), ("eval", "sensitivity")}  # many entries that differ from the defaults on purpose


def nodes(tree):
    """Every mapping with a `_target_`, at any depth."""
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield tree
        for child in tree.values():
            yield from nodes(child)


def components(group, name):
    # An allocator's defaults may come from the model or the scale, which are absent here.
    found = list(nodes(OmegaConf.to_container(registry.composed(group, name), resolve=group == "allocator")))
    assert found, f"configs/{group}/{name}.yaml names no component"
    return found


def fields_of(node):
    return {f.name: f for f in dataclasses.fields(get_class(node["_target_"]))}


@pytest.mark.parametrize(("group", "at_least"), GROUPS.items())
def test_the_files_of_every_group_are_found(group, at_least):
    assert len([name for found, name in FILES if found == group]) >= at_least
    assert len(registry.names(group)) == len(list((paths.configs() / group).rglob("*.yaml")))


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_config_binds_to_its_component(group, name):
    for node in components(group, name):
        kind = get_class(node["_target_"])
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
        options = {key: value for key, value in node.items() if key not in ("_target_", *registry.RESERVED)}
        inspect.signature(kind).bind(**options)
        assert set(options) <= set(fields_of(node))


@pytest.mark.parametrize(("group", "name"), [f for f in FILES if f[0] in VERSIONED])
def test_a_config_shows_every_parameter_with_the_default_of_its_class(group, name):
    free = ["${eval.limit}", "${oc.select:tuning,null}"]
    for node in components(group, name):
        if get_class(node["_target_"]).__module__.startswith("sparsify.data"):
            continue  # a text has conventions of its own
        for key, field in fields_of(node).items():
            assert key in node, f"{key} is missing"
            if field.default is not dataclasses.MISSING and node[key] not in free and (group, name) not in SWEEPS:
                assert node[key] == field.default, key


@pytest.mark.parametrize(("group", "name"), FILES)
def test_a_version_is_the_one_of_its_class(group, name):
    versions = [(node, f["version"].default) for node in components(group, name) if "version" in (f := fields_of(node))]
    assert bool(versions) == (group in VERSIONED)
    for node, version in versions:
        assert node["version"] == version >= 1


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_config_has_a_header(group, name):
    first = registry.find(group, name).read_text().splitlines()[0]
    assert first.startswith("# ")


@pytest.mark.parametrize(("group", "name"), [f for f in FILES if f[0] in ("pruner", "allocator", "method")])
def test_a_name_builds_its_component(group, name):
    node = components(group, name)[0]
    required = {key: "something" for key, value in node.items() if value == "???"}
    assert type(registry.build(group, (name, required))) is get_class(node["_target_"])
    for key in required:
        with pytest.raises(UsageError, match=f"{key} must be given"):
            registry.build(group, name)


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_name_lists_the_known_ones(group):
    with pytest.raises(UsageError) as caught:
        registry.build(group, "no-such-thing")
    assert all(name in str(caught.value) for name in registry.names(group))


@pytest.mark.parametrize(("spec", "fix"), [("wnda", "wanda"), (("sparsegpt", {"dmap": 0.1}), "damp")])
def test_a_typo_is_answered_with_the_near_name(spec, fix):
    with pytest.raises(UsageError, match=f"Fix: .*{fix}"):
        registry.build("pruner", spec)


def test_an_object_passes_through():
    pruner = registry.build("pruner", ("sparsegpt", {"damp": 0.1}))
    assert pruner.damp == 0.1
    assert registry.build("pruner", pruner) is pruner


def test_a_component_that_refuses_its_value_says_so_itself():
    with pytest.raises(UsageError, match="slab width"):
        registry.build("pruner", ("sparsegpt", {"damp": -1.0}))
