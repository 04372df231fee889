"""What quantising promises of every family: zeros that stay to the bit, and codes that outlive saving and loading."""

import pytest
import torch
from families import FAMILIES, MIXTURES, VOCABULARY

from sparsify.cells import kept
from sparsify.data.inputs import as_inputs
from sparsify.methods.joint import Joint
from sparsify.methods.oneshot import OneShot
from sparsify.methods.quantising import GPTQ, RoundToNearest
from sparsify.model.blocks import BlockView
from sparsify.quantisation.grid import check_on_grids
from sparsify.quantisation.stored import grids_in
from sparsify.recipe import Recipe, prune_model
from sparsify.runs import registry

TOKENS = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
WAYS = {
    "rtn": (OneShot(), {"quantiser": RoundToNearest(bits=3, group=16)}),
    "gptq": (OneShot(), {"quantiser": GPTQ(bits=3, group=16)}),
    "symmetric": (OneShot(), {"quantiser": GPTQ(bits=8, group=None, symmetric=True, order="activations")}),
    "joint": (Joint(bits=3, group=16), {}),
}
"""A method and stages after it."""
CASES = [
    *((family, "gptq", dtype) for family in (*FAMILIES, *MIXTURES) for dtype in (torch.float32, torch.bfloat16)),
    *((family, way, torch.float16) for family in ("llama", "gpt2", "mixtral") for way in WAYS),
]


def quantise(view, way, pruner="sparsegpt", sparsity=0.6):
    method, stages = WAYS[way]
    pruner, allocator = registry.build("pruner", pruner), registry.build("allocator", "uniform")
    return prune_model(
        view, as_inputs(TOKENS), Recipe.of(pruner, allocator, method, "unstructured", sparsity, stages=stages)
    )


def codes_of(view, grids):
    return {layer.spec.name: grids[layer.spec.name].codes(layer.weight) for layer in view.layers}


@pytest.mark.parametrize(("family", "way", "dtype"), CASES)
def test_a_saved_model_has_the_same_zeros_and_codes_when_it_is_loaded(family, way, dtype, tmp_path):
    build = (FAMILIES | MIXTURES)[family].build
    view = BlockView(build(dtype))
    dense = view.snapshot()
    result = quantise(view, way)
    before, zeros = codes_of(view, result.grids), {x.spec.name: int((x.weight == 0).sum()) for x in view.layers}
    file = kept.save(tmp_path, view, dense, result.masks, result.grids)

    other = BlockView(build(dtype))
    masks, grids = kept.load(tmp_path, file, other), grids_in(tmp_path / file.file)
    masks.check(other)
    check_on_grids(other, grids)
    assert set(grids) == set(masks) == {layer.spec.name for layer in view.layers}
    assert {x.spec.name: int((x.weight == 0).sum()) for x in other.layers} == zeros
    assert sum(zeros.values()) / view.table.numel == result.sparsity
    after = codes_of(other, grids)
    for layer in other.layers:
        name, mask = layer.spec.name, masks[layer.spec.name]
        assert torch.equal(after[name], before[name])
        assert torch.equal(grids[name].values(after[name]).to(dtype)[mask], layer.weight[mask]), "codes are the weights"
        assert torch.equal(mask, result.masks[name])


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "magnitude"])
def test_zeros_stay_to_the_bit(pruner, make_model):
    pruned = BlockView(make_model())
    masks = prune_model(
        pruned,
        as_inputs(TOKENS),
        Recipe.of(
            registry.build("pruner", pruner), registry.build("allocator", "uniform"), OneShot(), "unstructured", 0.6
        ),
    ).masks
    for way in ("rtn", "gptq"):
        view = BlockView(make_model())
        result = quantise(view, way, pruner)
        for layer, before in zip(view.layers, pruned.layers, strict=True):
            gone = ~masks[layer.spec.name]
            assert torch.equal(result.masks[layer.spec.name], ~gone)
            assert torch.equal(layer.weight[gone].signbit(), before.weight[gone].signbit())
            assert not layer.weight[gone].any()
