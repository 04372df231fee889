"""What training promises of every family and pruner: the zeros that pruning made are those at the end, to the bit."""

import pytest
import torch
from families import FAMILIES, MIXTURES, VOCABULARY

from sparsify.data.inputs import as_inputs
from sparsify.methods.job import Job
from sparsify.methods.losa import LoSA
from sparsify.methods.oneshot import OneShot
from sparsify.methods.tuning import FullFineTuning, MaskedLoRA
from sparsify.model.blocks import BlockView
from sparsify.recipe import Recipe, prune_model
from sparsify.recovery.schedule import Schedule
from sparsify.runs import registry

SCHEDULE = Schedule(rate=1e-2, batch=2, dropout=0.1, clip=1.0, warmup=0.0)
TOKENS = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
WAYS = {
    "once": (OneShot(), {}),
    "losa": (LoSA(training=TOKENS, schedule=SCHEDULE, steps=2), {}),
    "masked_lora": (OneShot(), {"recovery": MaskedLoRA(training=TOKENS, schedule=SCHEDULE)}),
    "full": (OneShot(), {"recovery": FullFineTuning(training=TOKENS, schedule=SCHEDULE)}),
}
"""A method and stages after it."""


@pytest.fixture
def pruned(monkeypatch):
    """Weights as every pruning of the model left them."""
    left, prune = [], Job.prune

    def spy(self, plan, **options):
        rows = prune(self, plan, **options)
        left.append({layer.spec.name: layer.weight.clone() for layer in self.view.layers})
        return rows

    monkeypatch.setattr(Job, "prune", spy)
    return left


def train(view, way, pruner="wanda", sparsity=0.7):
    method, stages = WAYS[way]
    pruner, allocator = registry.build("pruner", pruner), registry.build("allocator", "uniform")
    recipe = Recipe.of(pruner, allocator, method, "unstructured", sparsity, stages=stages)
    return prune_model(view, as_inputs(TOKENS), recipe, heldout=as_inputs(TOKENS))


def check_zeros(view, left, result, way):
    """Zeros are those that pruning left, and whatever can be trained has other weights than then."""
    for layer in view.layers:
        now, before = layer.weight, left[layer.spec.name]
        assert torch.equal(now == 0, before == 0), layer.spec.name
        assert torch.equal(result.masks[layer.spec.name], now != 0)
        if way != "full":  # which writes zeros anew, without their sign
            assert torch.equal(now.signbit()[now == 0], before.signbit()[now == 0]), layer.spec.name
        if way == "full" or layer.expert is None:
            assert not torch.equal(now, before), layer.spec.name
    zeros, numel = (sum(getattr(row, name) for row in result.layers) for name in ("zeros", "numel"))
    assert result.sparsity == zeros / numel


@pytest.mark.parametrize("way", ["losa", "masked_lora", "full"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in (*FAMILIES, *MIXTURES)),
        ("llama", torch.float32),
        ("gpt2", torch.float32),
    ],
)
def test_training_and_merging_move_no_zero_in_any_family(family, way, dtype, pruned):
    view = BlockView((FAMILIES | MIXTURES)[family].build(dtype))
    result = train(view, way)
    assert len(pruned) == (2 if way == "losa" else 1)
    check_zeros(view, pruned[-1], result, way)


@pytest.mark.parametrize("pruner", registry.names("pruner"))
def test_the_loop_ends_at_its_sparsity_with_every_pruner(pruner, pruned, make_model):
    view = BlockView(make_model())
    result = train(view, "losa", pruner)
    check_zeros(view, pruned[-1], result, "losa")
    assert result.sparsity == train(BlockView(make_model()), "once", pruner).sparsity
    assert result.sparsity == pytest.approx(0.7, abs=0.02)  # rows of 32 and 48 weights
