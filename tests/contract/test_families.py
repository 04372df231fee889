import copy
from functools import cache

import pytest
import torch
from families import FAMILIES, VOCABULARY
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparsify
from sparsify.errors import NumericsError, UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import GRAM, NORM
from sparsify.model.walk import Walk
from sparsify.runs import registry

SEQLEN = 11  # longer than the sliding windows of the families that have one
PRUNERS = registry.names("pruner")
TOKENS = torch.randint(3, VOCABULARY, (5, SEQLEN), generator=torch.Generator().manual_seed(2))

every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def built(family, dtype):
    return FAMILIES[family].build(dtype)


def fresh(family="llama", dtype=torch.float32):
    """A copy of the family's model, safe to prune."""
    return copy.deepcopy(built(family, dtype))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def hidden_after_every_block(model, tokens):
    """What the model's own forward gives, by hooks on its blocks."""
    blocks, seen = BlockView(model).blocks, []
    handles = [block.register_forward_hook(lambda _m, _a, out: seen.append(first(out).clone())) for block in blocks]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def intact(model):
    """No hook, no replaced forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return not any(getattr(m, name) for m in model.modules() for name in hooks) and not any(
        "forward" in vars(m) for m in model.modules()
    )


def zeros_by_row(layer):
    return (layer.weight == 0).sum(dim=1)


@every_family
def test_walking_the_blocks_is_the_models_own_forward(family):
    model = fresh(family)
    walk = Walk(BlockView(model), TOKENS, batch_size=2)
    expected = hidden_after_every_block(model, TOKENS)
    assert len(expected) == FAMILIES[family].blocks
    for block, hidden in enumerate(expected):
        walk.advance(block)
        torch.testing.assert_close(walk.hidden, hidden, rtol=1e-4, atol=1e-4)
    assert intact(model)


@every_family
def test_every_linear_layer_of_the_blocks_is_found(family):
    model = fresh(family)
    view = BlockView(model)
    inside = [m for block in view.blocks for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert [layer.module for layer in view.layers] == inside
    kinds = FAMILIES[family].inputs
    assert len(view.layers) == FAMILIES[family].blocks * sum(map(len, kinds))
    assert view.table.numel == sum(m.weight.numel() for m in inside)
    for layer in view.layers:
        assert model.get_submodule(layer.spec.name) is layer.module
        assert layer.weight.shape == (layer.spec.out_features, layer.spec.in_features)


@every_family
def test_layers_that_read_the_same_tensor_share_their_statistics(family):
    view = BlockView(fresh(family))
    walk = Walk(view, TOKENS, 2)

    def ending(name, kinds):
        return next(kind for kind in kinds if name.endswith(f".{kind}"))

    expected = FAMILIES[family].inputs
    kinds = set().union(*expected)
    assert [{ending(name, kinds) for name in group} for group in walk.shared_inputs(0)] == expected
    stats = walk.observe(0, frozenset({NORM}))
    assert len({id(item) for item in stats.values()}) == len(expected)
    assert stats.keys() == {layer.spec.name for layer in view.layers_of(0)}


@every_family
def test_statistics_are_those_of_the_layers_inputs(family):
    model = fresh(family)
    view, seen = BlockView(model), {}

    def keep(name):
        return lambda _m, args: seen.update({name: args[0].clone()})

    handles = [layer.module.register_forward_pre_hook(keep(layer.spec.name)) for layer in view.layers]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    walk = Walk(view, TOKENS, 2)
    for block in range(len(view.blocks)):
        stats = walk.observe(block, frozenset({NORM, GRAM}), advance=True)
        for name, item in stats.items():
            x = seen[name].reshape(-1, seen[name].shape[-1])
            torch.testing.assert_close(item.square, x.square().sum(dim=0) / 5, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(item.gram, 2 * x.T @ x / 5, rtol=1e-3, atol=1e-3)


@every_family
@pytest.mark.parametrize("pruner", PRUNERS)
def test_half_of_every_layer_goes(family, pruner):
    model = fresh(family, torch.bfloat16 if PRUNERS.index(pruner) % 2 else torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    result = sparsify.prune(model, TOKENS, pruner=pruner, sparsity=0.5, batch_size=2)
    view = BlockView(model)
    for layer, row in zip(view.layers, result.layers, strict=True):
        zeros = zeros_by_row(layer)
        assert abs(int(zeros.sum()) - layer.spec.numel // 2) <= layer.spec.out_features
        assert (row.name, row.zeros, row.numel) == (layer.spec.name, int(zeros.sum()), layer.spec.numel)
        assert 0 < row.error < 1
    assert result.sparsity == pytest.approx(0.5, abs=0.02) == view.sparsity()
    pruned = {f"{layer.spec.name}.weight" for layer in view.layers}
    for name, weight in model.named_parameters():
        assert (weight.dtype, weight.device) == (before[name].dtype, before[name].device)
        assert torch.equal(weight, before[name]) == (name not in pruned)
    assert intact(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("pattern", ["2:4", "mixed:8"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_n_of_m_holds_in_every_group(family, pattern, pruner):
    model = fresh(family)
    allocator = "uniform" if pattern == "2:4" else ("atp", {"beta": 0.1})
    result = sparsify.prune(model, TOKENS, pruner=pruner, allocator=allocator, sparsity=0.5, pattern=pattern)
    for layer in BlockView(model).layers:
        target = result.plan.targets[layer.spec.name]
        kept = (layer.weight.reshape(-1, target.group) != 0).sum(dim=1)
        assert (kept == target.kept).all()
    assert result.sparsity == pytest.approx(0.5, abs=1e-9)


def test_a_fixed_pattern_implies_the_sparsity():
    assert sparsify.prune(fresh(), TOKENS, pattern="1:4").sparsity == 0.75


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_regimes_differ_in_where_statistics_come_from(family):
    dense = fresh(family)
    inputs = {regime: inputs_at_pruning(fresh(family), regime) for regime in ("propagated", "sequential", "dense")}
    expected = {
        "dense": lambda done, block: set(),
        "propagated": lambda done, block: {name for name, at in done if at < block},
        "sequential": lambda done, block: {name for name, _ in done},
    }
    for regime, steps in inputs.items():
        pruned, done = fresh(family), []
        for group, block, square, weights in steps:
            model = copy.deepcopy(dense)
            for name in expected[regime](done, block):
                model.get_submodule(name).weight.data.copy_(pruned.get_submodule(name).weight.data)
            assert_square(model, group[0], square)
            for name in group:
                pruned.get_submodule(name).weight.data.copy_(weights[name])
                done.append((name, block))


def inputs_at_pruning(model, regime):
    """(layer names, block, statistic, new weights) of each distinct input, in the order they were pruned."""
    from sparsify.methods.oneshot import OneShot
    from sparsify.pruners.magnitude import Magnitude

    class Spy(Magnitude):
        needs = frozenset({NORM})

        def prune(self, weight, stats, target):
            seen.append(stats)
            return super().prune(weight, stats, target)

    seen, view = [], BlockView(model)
    order = sparsify.prune(model, TOKENS, pruner=Spy(), sparsity=0.5, method=OneShot(regime), batch_size=2).layers
    assert len(seen) == len(order) == len(view.layers)
    steps = {}
    for row, stats in zip(order, seen, strict=True):
        steps.setdefault((id(stats), row.block), (stats, []))[1].append(row.name)
    return [
        (names, block, stats.square, {name: model.get_submodule(name).weight.data for name in names})
        for (_, block), (stats, names) in steps.items()
    ]


def assert_square(model, name, square):
    """The input of a layer, in the model's own forward, has this statistic."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    handle.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1])
    torch.testing.assert_close(square, x.square().sum(dim=0) / len(TOKENS), rtol=1e-3, atol=1e-3)


@every_family
def test_mode_is_restored_and_dropout_is_off_meanwhile(family):
    trained, evaluated = fresh(family).train(), fresh(family)
    for model in (trained, evaluated):
        sparsify.prune(model, TOKENS, sparsity=0.5)
    assert trained.training
    assert not evaluated.training
    for a, b in zip(trained.parameters(), evaluated.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_part_that_was_frozen_in_eval_mode_stays_so():
    model = fresh().train()
    model.model.layers[0].eval()
    sparsify.prune(model, TOKENS, sparsity=0.5)
    assert model.training
    assert not model.model.layers[0].training


class Broken(Exception):
    """Something foreign, raised from inside."""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("where", ["first forward", "recording", "layer", "pruner"])
def test_an_exception_leaves_no_hook_and_no_replaced_forward(family, where, monkeypatch):
    model, calls = fresh(family).train(), []
    view = BlockView(model)

    def explode(*_args, **_kwargs):
        calls.append(1)
        raise Broken

    if where == "layer":
        view.layers[-1].module.register_forward_pre_hook(explode)
    elif where == "pruner":
        monkeypatch.setattr("sparsify.pruners.wanda.Wanda.score", explode)
    else:
        own, skip = type(model.base_model).forward, 0 if where == "first forward" else 1

        def forward(self, *args, **kwargs):
            out = own(self, *args, **kwargs)
            return explode() if len(calls) == skip else calls.append(1) or out

        monkeypatch.setattr(type(model.base_model), "forward", forward)
    with pytest.raises(Broken):
        sparsify.prune(model, TOKENS, sparsity=0.5, batch_size=2)
    assert calls
    view.layers[-1].module._forward_pre_hooks.clear()
    assert intact(model)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_snapshot_restores_every_weight(family):
    model = fresh(family)
    view = BlockView(model)
    dense = view.snapshot()
    sparsify.prune(model, TOKENS, pruner="sparsegpt", sparsity=0.5)
    assert view.sparsity() > 0.4
    view.restore(dense)
    for a, b in zip(model.parameters(), built(family, torch.float32).parameters(), strict=True):
        assert torch.equal(a, b)


@every_family
def test_perplexity_is_the_models_own_loss(family):
    model = fresh(family)
    with torch.no_grad():
        expected = model(TOKENS, labels=TOKENS).loss.exp()
    assert sparsify.perplexity(model, TOKENS, batch_size=2) == pytest.approx(float(expected), rel=1e-4)


def test_results_do_not_depend_on_the_batch_size():
    one, many = fresh(), fresh()
    for model, size in ((one, 1), (many, 5)):
        sparsify.prune(model, TOKENS, pruner="sparsegpt", sparsity=0.5, batch_size=size)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_search_of_atp_leaves_only_the_winner(monkeypatch):
    model, best = fresh(), fresh()
    result = sparsify.prune(model, TOKENS, allocator=("atp", {"step": 0.2}), sparsity=0.5, heldout=TOKENS[:2])
    assert len(result.plan.trials) > 2
    scores = {trial["beta"]: trial["heldout_perplexity"] for trial in result.plan.trials}
    assert result.plan.notes["beta"] == min(scores, key=scores.get)
    sparsify.prune(best, TOKENS, allocator=("atp", {"beta": result.plan.notes["beta"]}), sparsity=0.5)
    assert sparsify.perplexity(model, TOKENS[:2]) == pytest.approx(min(scores.values()))
    for a, b in zip(model.parameters(), best.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sparsity_zero_changes_nothing():
    model = fresh()
    assert sparsify.prune(model, TOKENS, pruner="sparsegpt", sparsity=0.0).sparsity == 0
    for a, b in zip(model.parameters(), fresh().parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_without_decoder_blocks_is_refused():
    with pytest.raises(UnsupportedModelError):
        BlockView(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_is_refused_by_layer_before_anything_changes(pruner, value):
    model = fresh()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj .*1 of 1536"):
        sparsify.prune(model, TOKENS, pruner=pruner, sparsity=0.5)
    for a, b in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
