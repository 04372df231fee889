import dataclasses
import inspect
import math

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from sparsify import paths
from sparsify.data.corpora import Corpus
from sparsify.data.windows import Windows
from sparsify.errors import NumericsError, SparsifyError, UsageError
from sparsify.methods.oneshot import output_error, prune_layer
from sparsify.model.blocks import Layer
from sparsify.model.statistics import NEEDS, Accumulator, LayerStats
from sparsify.pruners.base import Pruned
from sparsify.runs import registry
from sparsify.types import LayerSpec, Target

GROUPS = {"pruner": 4, "allocator": 13, "method": 1, "eval": 1, "logger": 2, "data": 4, "model": 10}
FILES = [(group, name) for group in GROUPS for name in registry.names(group)]
PRUNERS = registry.names("pruner")
VERSIONED = ("pruner", "allocator", "method", "eval")
SWEEPS = {("eval", "absorption")}  # many entries that differ from the defaults on purpose


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
    free = ["${eval.limit}"]
    for node in components(group, name):
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
    assert type(registry.build(group, name)) is get_class(node["_target_"])


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


# The pruner contract


def stats_of(x):
    accumulator = Accumulator(NEEDS)
    accumulator.fold(x, len(x))
    return accumulator.finalise(len(x))


@pytest.fixture
def stats():
    return stats_of(torch.randn(3, 20, 16))


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [Target(0.0), Target(0.3), Target(0.5), Target(1.0), Target(0.5, 2, 4)])
def test_a_pruner_zeroes_what_it_says_and_no_more(name, dtype, target, stats):
    pruner = registry.build("pruner", name)
    weight = torch.randn(8, 16).to(dtype)
    before = weight.clone()
    pruned = pruner.prune(weight, stats, target)
    assert isinstance(pruned, Pruned)
    assert torch.equal(weight, before)
    assert pruned.weight.shape == pruned.keep.shape == weight.shape
    assert not pruned.weight[~pruned.keep].any()
    assert pruned.weight[pruned.keep].all()
    wanted = target.sparsity * 128
    assert wanted - 8 < int((~pruned.keep).sum()) <= wanted


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_reads_only_what_it_needs(name):
    pruner = registry.build("pruner", name)
    assert pruner.needs <= NEEDS
    accumulator = Accumulator(pruner.needs)
    accumulator.fold(torch.randn(3, 20, 16), 3)
    assert int((~pruner.prune(torch.randn(8, 16), accumulator.finalise(3), Target(0.5)).keep).sum()) == 64


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_is_deterministic(name, stats):
    weight = torch.randn(8, 16)
    first, again = (registry.build("pruner", name).prune(weight, stats, Target(0.5)) for _ in range(2))
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize("name", PRUNERS)
def test_more_sparsity_keeps_a_subset(name, stats):
    weight = torch.randn(8, 16)
    half, most = (registry.build("pruner", name).prune(weight, stats, Target(s)).keep for s in (0.5, 0.75))
    assert (half | ~most).all()


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_are_pruned_in_place(name, transposed, stats):
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(8, 16) if transposed else torch.nn.Linear(16, 8)
    storage = module.weight.data_ptr()
    layer = Layer(LayerSpec("some.layer", 3, "layer", 8, 16), module)
    row = prune_layer(layer, stats, registry.build("pruner", name), Target(0.5))
    assert module.weight.data_ptr() == storage
    assert int((module.weight == 0).sum()) == row.zeros == 64
    assert (row.name, row.block, row.target, row.achieved) == ("some.layer", 3, 0.5, 0.5)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_weight_that_is_not_a_number_is_refused_with_the_layers_name(name, stats):
    module = torch.nn.Linear(16, 8)
    module.weight.data[2, 3] = math.nan
    layer = Layer(LayerSpec("some.layer", 0, "layer", 8, 16), module)
    with pytest.raises(NumericsError) as caught:
        prune_layer(layer, stats, registry.build("pruner", name), Target(0.5))
    assert "some.layer" in caught.value.paragraph()


def test_the_layers_name_is_in_the_message_that_a_traceback_shows(stats):
    module = torch.nn.Linear(16, 8)
    module.weight.data[2, 3] = math.nan
    layer = Layer(LayerSpec("some.layer", 0, "layer", 8, 16), module)
    with pytest.raises(SparsifyError, match=r"some\.layer"):
        prune_layer(layer, stats, registry.build("pruner", "wanda"), Target(0.5))


def test_the_output_error_is_that_of_the_layers_output():
    x, before, after = torch.randn(3, 20, 16), torch.randn(8, 16), torch.randn(8, 16)
    exact = ((before - after) @ x.reshape(-1, 16).T).norm() / (before @ x.reshape(-1, 16).T).norm()
    assert output_error(before, after, stats_of(x)) == pytest.approx(float(exact), rel=1e-4)
    without_data = (before - after).norm() / before.norm()
    assert output_error(before, after, LayerStats(0)) == pytest.approx(float(without_data), rel=1e-4)
    assert output_error(before, before, stats_of(x)) == 0


def test_the_perplexity_evaluator_reports_value_protocol_and_text(make_model, tmp_path):
    from sparsify import perplexity
    from sparsify.evaluation.base import Subject
    from sparsify.evaluation.perplexity import Perplexity

    windows = Windows(Corpus("noise", path=str(tmp_path)), "test", 8, 3)
    model, cut = make_model(vocab_size=1000), windows.cut(None, 0)
    asked = []
    subject = Subject(model, None, lambda spec: asked.append(spec) or cut, {}, batch_size=2)
    measured = Perplexity(windows).evaluate(subject)
    assert asked == [windows]
    assert measured == {
        "metric": "perplexity",
        "value": perplexity(model, cut.tokens, batch_size=2),
        "protocol": "noise@8x3",
        "text": cut.provenance,
    }
