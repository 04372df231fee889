"""Stages that quantise, the joint method, and what the record says of them."""

from dataclasses import dataclass

import pytest
import torch

import sparsify
from sparsify.allocators.arithmetic import Arithmetic, RelativeProgression
from sparsify.allocators.bits import sparsity_of
from sparsify.data.inputs import as_inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.base import Stage, StageResult
from sparsify.methods.joint import Joint
from sparsify.methods.oneshot import OneShot
from sparsify.methods.quantising import GPTQ, RoundToNearest
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import GRAM
from sparsify.model.walk import Walk
from sparsify.pruners.sparsegpt import SparseGPT, inverse_factor
from sparsify.pruners.wanda import Wanda
from sparsify.quantisation.gptq import quantise, round_to_nearest
from sparsify.quantisation.grid import Precision
from sparsify.quantisation.size import Stored, sizes
from sparsify.recipe import Recipe, prune_model
from sparsify.runs import registry
from sparsify.types import Pattern


@pytest.fixture
def inputs(tokens):
    return as_inputs(tokens)


@pytest.fixture
def view(make_model):
    return BlockView(make_model())


def run(view, inputs, stage=None, *, method=None, sparsity=0.5, pattern="unstructured", pruner=None, heldout=None):
    stages = {"quantiser": stage} if stage else {}
    pruner = pruner or SparseGPT()
    recipe = Recipe.of(
        pruner, registry.build("allocator", "uniform"), method or OneShot(), pattern, sparsity, stages=stages
    )
    return prune_model(view, inputs, recipe, heldout=heldout)


def noted(result, name):
    return result.notes.get(f"quantiser.{name}", result.notes.get(name))


def test_rounding_is_that_of_every_layer_under_its_mask(make_model, inputs):
    pruned, view = BlockView(make_model()), BlockView(make_model())
    masks = run(pruned, inputs).masks
    result = run(view, inputs, RoundToNearest(bits=3, group=12))
    for before, layer in zip(pruned.layers, view.layers, strict=True):
        keep = masks[layer.spec.name]
        expected = round_to_nearest(before.weight, keep, Precision(3, 12), torch.float16)
        assert torch.equal(layer.weight, expected.weight)
        assert result.grids[layer.spec.name].holds(layer.weight)


@pytest.mark.parametrize("order", ["columns", "activations"])
def test_gptq_walks_with_inputs_of_the_quantised_blocks_before(order, make_model, inputs):
    pruned, view = BlockView(make_model()), BlockView(make_model())
    masks = run(pruned, inputs).masks
    run(view, inputs, GPTQ(bits=3, group=16, order=order))
    walk = Walk(pruned, inputs)
    for block in range(2):
        stats = walk.observe(block, frozenset({GRAM}))
        for layer in pruned.layers_of(block):
            gram = stats[layer.spec.name].gram
            by = gram.diagonal().argsort(descending=True, stable=True) if order == "activations" else None
            factor = inverse_factor(gram if by is None else gram[by][:, by], 0.01)
            keep = masks[layer.spec.name]
            layer.write(quantise(layer.weight, keep, factor, Precision(3, 16), torch.float16, by).weight)
        walk.advance(block)
    for ours, expected in zip(view.layers, pruned.layers, strict=True):
        assert torch.equal(ours.weight, expected.weight)


def test_the_record_states_the_size_of_mask_codes_scales_and_zero_points(view, inputs):
    result = run(view, inputs, GPTQ(bits=3, group=20))
    groups = sum(x.out_features * -(-x.in_features // 20) for x in view.table)
    kept = sum(int(mask.sum()) for mask in result.masks.values())
    numel = view.table.numel
    assert noted(result, "mask_bits") == 1
    assert noted(result, "code_bits") == 3 * kept / numel
    assert noted(result, "grid_bits") == groups * (16 + 3) / numel
    assert noted(result, "bits_per_weight") == pytest.approx(1 + 3 * kept / numel + groups * 19 / numel)
    assert noted(result, "bytes") == -(-(numel + 3 * kept + 19 * groups) // 8)
    assert noted(result, "bytes_dense") == 2 * numel
    assert noted(result, "pruned") == 1 - kept / numel
    assert noted(result, "pruned") + noted(result, "rounded_to_zero") == pytest.approx(result.sparsity)
    assert noted(result, "block_bits") == [3, 3]
    assert set(noted(result, "errors")) == {layer.name for layer in view.table}
    assert 0 < max(noted(result, "errors").values()) < 1


def test_a_symmetric_grid_has_no_zero_points_and_a_matrix_without_mask_no_mask(make_table):
    table = make_table([(4, 10)], [(2, 10)])
    first, second = (layer.name for layer in table)
    found = sizes(table, {first: Stored(12, 4, 8, False), second: Stored(None, 2, 4, True)})
    assert found["mask_bits"] == 40 / 60
    assert found["code_bits"] == (12 * 4 + 20 * 2) / 60
    assert found["grid_bits"] == (8 * 16 + 4 * (16 + 2)) / 60
    assert found["bits_per_weight"] == pytest.approx((40 + 88 + 200) / 60)


def test_a_dense_model_is_quantised_too(view, inputs):
    result = run(view, inputs, GPTQ(bits=8, group=16), sparsity=0.0)
    assert not result.masks
    assert noted(result, "mask_bits") == noted(result, "pruned") == 0
    assert noted(result, "code_bits") == 8
    assert noted(result, "rounded_to_zero") == result.sparsity


@pytest.mark.parametrize("stage", [RoundToNearest, GPTQ])
def test_more_bits_err_less(stage, make_model, inputs):
    errors = []
    for bits in (2, 3, 4, 8):
        result = run(BlockView(make_model()), inputs, stage(bits=bits, group=16))
        errors.append(sum(noted(result, "errors").values()))
    assert errors == sorted(errors, reverse=True)


# Bits by block


@pytest.mark.parametrize("way", [RoundToNearest, GPTQ, Joint])
def test_an_allocator_shares_out_the_bits(way, make_model, inputs):
    view = BlockView(make_model(num_hidden_layers=6))
    made = way(bits=3.5, group=16, allocator=RelativeProgression(0.5))
    result = run(view, inputs, **({"method": made} if way is Joint else {"stage": made}))
    bits = noted(result, "block_bits")
    assert noted(result, "mean_bits") == 3.5
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) > 1
    assert noted(result, "allocator.beta") > 0
    for layer in view.layers:
        grid = result.grids[layer.spec.name]
        assert grid.precision.bits == bits[layer.spec.block]
        assert all(
            len(set(row.tolist())) <= 2**grid.precision.bits for part in layer.weight.split(16, 1) for row in part
        )


def test_a_rule_is_asked_about_the_dense_model(make_model, inputs):
    seen = []

    @dataclass(frozen=True)
    class Spy(RelativeProgression):
        def profile(self, layers, sparsity, context):
            seen.append((sparsity, str(context.pattern), context.view.sparsity()))
            return super().profile(layers, sparsity, context)

    run(BlockView(make_model()), inputs, GPTQ(bits=3, group=16, allocator=Spy(0.2)), pattern="2:4")
    assert seen == [(sparsity_of(3), "unstructured", 0.0)]


def test_a_search_tries_bits_by_rounding_and_leaves_the_model_dense(make_model, inputs, monkeypatch):
    view = BlockView(make_model(num_hidden_layers=4))
    dense, scored = view.snapshot(), []
    monkeypatch.setattr(
        "sparsify.methods.job.Job.score", lambda self: scored.append(self.view.sparsity()) or 1.0 + len(scored)
    )
    stage = RoundToNearest(bits=3, group=16, allocator=Arithmetic("auto", step=0.1))
    result = run(view, inputs, stage, heldout=inputs)
    trials = noted(result, "trials")
    assert len(trials) == len(scored) > 1
    assert max(scored) < 0.5 < sparsity_of(3), "rounded, not pruned"
    assert noted(result, "allocator.beta") == trials[0]["beta"]
    view.restore(dense)
    assert not dense.changed()


# The joint method


def test_the_joint_method_prunes_to_the_plan_and_quantises(view, inputs):
    result = run(view, inputs, method=Joint(bits=4, group=16), sparsity=0.6)
    assert [row.name for row in result.layers] == [layer.spec.name for layer in view.layers]
    assert noted(result, "pruned") == pytest.approx(0.6, abs=0.01)
    for row, layer in zip(result.layers, view.layers, strict=True):
        assert row.zeros == int((layer.weight == 0).sum()) >= int((~result.masks[row.name]).sum())
        assert 0 < row.error < 1


@pytest.mark.parametrize("pattern", ["2:4", "mixed:8"])
def test_the_joint_method_keeps_to_the_pattern(pattern, view, inputs):
    result = run(view, inputs, method=Joint(bits=4, group=16), pattern=pattern)
    of = Pattern.parse(pattern).group
    for layer in view.layers:
        mask = result.masks[layer.spec.name]
        assert set(mask.reshape(-1, of).sum(dim=1).tolist()) == {of // 2}


def test_a_dense_joint_solve_is_gptq(make_model, inputs):
    one, other = BlockView(make_model()), BlockView(make_model())
    run(one, inputs, method=Joint(bits=3, group=16), sparsity=0.0)
    run(other, inputs, GPTQ(bits=3, group=16), sparsity=0.0)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.layers, other.layers, strict=True))


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(rule="released")])
def test_the_joint_method_is_sparsegpts(pruner, view, inputs):
    dense = view.snapshot()
    with pytest.raises(UsageError, match=r"Only SparseGPT.*Fix: pruner=sparsegpt"):
        run(view, inputs, method=Joint(), pruner=pruner)
    assert not dense.changed()


def test_no_stage_follows_the_joint_method(view, inputs):
    with pytest.raises(UsageError, match="quantiser after Joint"):
        run(view, inputs, RoundToNearest(), method=Joint())


def test_groups_that_the_pattern_does_not_fit_into_are_refused_before_pruning(view, inputs):
    dense = view.snapshot()
    with pytest.raises(UsageError, match=r"Fix: method\.group=4"):
        run(view, inputs, method=Joint(group=6), pattern="2:4")
    assert not dense.changed()


# What goes wrong


def test_weights_that_leave_their_grid_are_caught(view, inputs):
    @dataclass(frozen=True)
    class Careless(Stage):
        version: int = 1

        def apply(self, view, masks, job):
            stage = RoundToNearest(bits=3, group=16)
            stage.prepare(job)
            result = stage.apply(view, masks, job)
            view.layers[3].weight.mul_(1.1)
            return StageResult(masks, result.notes, grids=result.grids)

    with pytest.raises(NumericsError, match=r"o_proj are not on the grid"):
        run(view, inputs, Careless())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (("rtn", {"bits": 5}), ["bits=5", "2, 3, 4, 8", "quantiser.bits=4"]),
        (("gptq", {"bits": 3.5}), ["bits=3.5", "allocator@quantiser.allocator=atp_relative"]),
        (("gptq", {"bits": 1}), ["bits=1", "2 to 8", "bits=2"]),
        (("gptq", {"bits": 16}), ["bits=16", "2 to 8", "bits=8"]),
        (("gptq", {"bits": True}), ["quantiser.bits"]),
        (("gptq", {"group": 1}), ["group is a whole number", ">= 2, or null"]),
        (("gptq", {"group": 64.5}), ["group"]),
        (("gptq", {"symmetric": 1}), ["true or false"]),
        (("gptq", {"damp": 0.0}), ["damp > 0"]),
        (("gptq", {"order": "rows"}), ["columns, activations"]),
        (("gptq", {"regime": "dens"}), ["quantiser.regime=dense"]),
        (("gptq", {"bit": 4}), ["did you mean bits"]),
        (("rtn", {"allocator": "owl"}), ["allocator"]),
        ("gtpq", ["gptq"]),
    ],
)
def test_bad_settings_are_one_paragraph(spec, words):
    with pytest.raises(UsageError) as caught:
        registry.build("quantiser", spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_library_call_quantises_by_name(make_model, tokens):
    model = make_model()
    result = sparsify.prune(
        model, tokens, pruner="sparsegpt", sparsity=0.5, quantiser=("gptq", {"bits": 3, "group": 16})
    )
    assert len(result.grids) == len(result.layers)
    joint = sparsify.prune(make_model(), tokens, pruner="sparsegpt", method=("joint", {"group": 16}), sparsity=0.5)
    assert joint.notes["mean_bits"] == 4


def test_the_library_call_leaves_a_dense_model_when_quantising_fails(make_model, tokens):
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UsageError):
        sparsify.prune(model, tokens, sparsity=0.5, quantiser=RoundToNearest(bits=3, allocator=Arithmetic(0.9)))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
