"""What every stage promises: zeros that stay, modules that stay, and a dense model that can be put back."""

import json
from dataclasses import dataclass

import pytest
import torch
from fakes import state_of

import sparsify
from sparsify.data.inputs import as_inputs
from sparsify.errors import NumericsError
from sparsify.methods.base import Stage, StageResult
from sparsify.methods.tuning import LoRA
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.recipe import Recipe, prune_model
from sparsify.runs import registry

GROUPS = ("recovery", "quantiser")
STAGES = [(group, name) for group in GROUPS for name in registry.names(group)]
TOKENS = torch.randint(3, 96, (4, 11), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Drift(Stage):
    """The smallest stage: the kept weights and a norm move a little; `zeros` too, if it is to be caught."""

    zeros: bool = False
    version: int = 1

    def apply(self, view, masks, job):
        for layer in view.layers:
            noise = 0.01 * torch.randn_like(layer.weight)
            layer.write(layer.weight + (noise if self.zeros else noise * masks[layer.spec.name]))
        view.model.model.norm.weight.data.mul_(1.1)
        return StageResult(masks)


def run(view, group, stage, seed=0):
    pruner, allocator = registry.build("pruner", "wanda"), registry.build("allocator", "uniform")
    recipe = Recipe.of(
        pruner, allocator, registry.build("method", "oneshot"), "unstructured", 0.5, stages={group: stage}
    )
    text = as_inputs(TOKENS)
    return prune_model(view, text, recipe, heldout=as_inputs(TOKENS, 2), training=text, seed=seed)


@pytest.mark.parametrize(("group", "stage"), [("recovery", Drift()), *STAGES])
def test_every_stage_keeps_its_promises(group, stage, make_model):
    stage = registry.build(group, stage)
    assert isinstance(stage, Stage)
    weights = []
    for _ in range(2):
        view = BlockView(make_model())
        dense, before = view.snapshot(), state_of(view.model)
        result = run(view, group, stage)
        assert state_of(view.model) == before, "a stage leaves modules, hooks, flags and gradients as it found them"
        json.dumps(dict(result.notes), allow_nan=False)
        if isinstance(stage, LoRA):  # the one that fills the zeros, and says so
            assert not result.masks
        else:
            assert set(result.masks) == {layer.spec.name for layer in view.layers}
            assert all(not layer.weight[~result.masks[layer.spec.name]].any() for layer in view.layers)
            assert result.sparsity == pytest.approx(0.5, abs=0.02)
        sparsify.perplexity(view.model, TOKENS)
        weights.append([layer.weight.clone() for layer in view.layers])
        view.restore(dense)
        assert not dense.changed()
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_a_stage_that_widens_its_masks_is_caught(make_model):
    @dataclass(frozen=True)
    class Wide(Stage):
        version: int = 1

        def apply(self, view, masks, job):
            wide = Masks()
            for name in masks:
                wide[name] = torch.ones_like(masks[name])
            return StageResult(wide)

    with pytest.raises(NumericsError, match="keep more than those it was given"):
        run(BlockView(make_model()), "recovery", Wide())


def test_a_stage_that_brings_pruned_weights_back_is_caught(make_model):
    with pytest.raises(NumericsError, match="no longer zero"):
        run(BlockView(make_model()), "recovery", Drift(zeros=True))
