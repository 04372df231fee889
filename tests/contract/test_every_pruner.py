"""What every pruner promises, found by the registry."""

import math

import pytest
import torch

from sparsify.errors import NumericsError, SparsifyError
from sparsify.methods.blockwise import output_error, prune_layer
from sparsify.model.masks import Masks
from sparsify.model.prunable import Layer
from sparsify.model.statistics import GRAM, Accumulator, LayerStats, reading
from sparsify.pruners.base import Pruned
from sparsify.runs import registry
from sparsify.types import LayerSpec, Target

PRUNERS = registry.names("pruner")
# Masks that are found anew for every sparsity, or edited after a ranking: what goes at half may stay at three quarters.
ANEW = {"alps", "admm", "dsnot", "least_squares"}


def stats_of(x, needs, weight=None):
    """Statistics of an input, of a pair of that and a noisy one, and of a gradient of the weight's shape."""
    inputs = Accumulator(reading(needs, "input", "pair"))
    inputs.fold(x, len(x), x + 0.1 * torch.randn_like(x))
    gradients = Accumulator(reading(needs, "gradient"))
    if weight is not None:
        gradients.fold(torch.randn(weight.shape), 1)
    return LayerStats(len(x), inputs.finalise(len(x)).values | gradients.finalise(1).values)


@pytest.fixture
def built():
    """A pruner, and statistics of what it needs for a matrix of 8 x 16."""

    def build(name):
        pruner = registry.build("pruner", name)
        return pruner, stats_of(torch.randn(3, 20, 16), pruner.needs, torch.empty(8, 16))

    return build


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [Target(0.0), Target(0.3), Target(0.5), Target(1.0), Target(0.5, 2, 4)])
def test_a_pruner_zeroes_what_it_says_and_no_more(name, dtype, target, built):
    pruner, stats = built(name)
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
def test_a_pruner_is_deterministic(name, built):
    weight = torch.randn(8, 16)
    pruner, stats = built(name)
    first, again = (pruner.prune(weight, LayerStats(3, stats.values), Target(0.5)) for _ in range(2))
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - ANEW))
def test_more_sparsity_keeps_a_subset(name, built):
    weight = torch.randn(8, 16)
    pruner, stats = built(name)
    half, most = (pruner.prune(weight, stats, Target(s)).keep for s in (0.5, 0.75))
    assert (half | ~most).all()


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_are_pruned_in_place(name, transposed, built):
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(8, 16) if transposed else torch.nn.Linear(16, 8)
    storage = module.weight.data_ptr()
    layer = Layer(LayerSpec("some.layer", 3, "layer", 8, 16), module)
    (pruner, stats), masks = built(name), Masks()
    row = prune_layer(layer, stats, pruner, Target(0.5), masks)
    assert module.weight.data_ptr() == storage
    assert torch.equal(masks["some.layer"], layer.weight != 0)
    assert int((module.weight == 0).sum()) == row.zeros == 64
    assert (row.name, row.block, row.target, row.achieved) == ("some.layer", 3, 0.5, 0.5)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_weight_that_is_not_a_number_is_refused_with_the_layers_name(name, built):
    pruner, stats = built(name)
    module = torch.nn.Linear(16, 8)
    module.weight.data[2, 3] = math.nan
    layer = Layer(LayerSpec("some.layer", 0, "layer", 8, 16), module)
    with pytest.raises(NumericsError) as caught:
        prune_layer(layer, stats, pruner, Target(0.5))
    assert "some.layer" in caught.value.paragraph()


def test_the_layers_name_is_in_the_message_that_a_traceback_shows(built):
    pruner, stats = built("wanda")
    module = torch.nn.Linear(16, 8)
    module.weight.data[2, 3] = math.nan
    layer = Layer(LayerSpec("some.layer", 0, "layer", 8, 16), module)
    with pytest.raises(SparsifyError, match=r"some\.layer"):
        prune_layer(layer, stats, pruner, Target(0.5))


def test_the_output_error_is_that_of_the_layers_output():
    x, before, after = torch.randn(3, 20, 16), torch.randn(8, 16), torch.randn(8, 16)
    exact = ((before - after) @ x.reshape(-1, 16).T).norm() / (before @ x.reshape(-1, 16).T).norm()
    assert output_error(before, after, stats_of(x, frozenset({GRAM}))) == pytest.approx(float(exact), rel=1e-4)
    without_data = (before - after).norm() / before.norm()
    assert output_error(before, after, LayerStats(0)) == pytest.approx(float(without_data), rel=1e-4)
    assert output_error(before, before, stats_of(x, frozenset({GRAM}))) == 0
