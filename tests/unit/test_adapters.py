import copy
import io

import pytest
import torch
from families import FAMILIES, MIXTURES, VOCABULARY
from torch import nn

import sparsify
from sparsify.errors import NumericsError, UnsupportedModelError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import recomputing
from sparsify.recovery.adapters import Adapters

TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
every_family = pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])


def pruned(family="llama", dtype=torch.float32, sparsity=0.7):
    """A model without gradients in which a share of every matrix is zero."""
    model = (FAMILIES | MIXTURES)[family].build(dtype).requires_grad_(False)
    view = BlockView(model)
    for layer in view.layers:
        layer.weight[torch.rand(layer.weight.shape) < sparsity] = 0
    return view


def logits(view):
    with torch.no_grad():
        return view.model(TOKENS, use_cache=False).logits


def loss(view):
    return view.model(TOKENS, labels=TOKENS, use_cache=False).loss


def trained(adapters, size=0.05):
    """Every stored B is something, as if trained; the adapters."""
    with torch.no_grad():
        for b in adapters.parameters()[1::2]:
            b.normal_(0, size)
    return adapters


def weights(view):
    return {layer.spec.name: layer.weight.clone() for layer in view.layers}


def same_bits(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], weight) and torch.equal(found[name].signbit(), weight.signbit())
        for name, weight in expected.items()
    )


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_merge_and_detach_in_every_family(family, dtype):
    view = pruned(family, dtype)
    before, found, keys = logits(view), weights(view), list(view.model.state_dict())
    with Adapters(view, 3, 5) as adapters:
        fused_or_not = logits(view)
        torch.testing.assert_close(fused_or_not, before, rtol=1e-4, atol=0.1 if dtype == torch.bfloat16 else 1e-4)
        trained(adapters)
        adapted = logits(view)
        moved = (adapted - before).float().norm()
        assert moved > 0.01 * before.float().norm()
        adapters.merge()
        tolerance = 0.35 if dtype == torch.bfloat16 else 1e-4
        assert (logits(view) - adapted).float().norm() < tolerance * moved
        for layer in view.layers:
            assert torch.equal(layer.weight == 0, found[layer.spec.name] == 0)
        assert not same_bits(weights(view), found)
        adapters.unmerge()
        assert same_bits(weights(view), found)
        assert torch.equal(logits(view), adapted)
    assert list(view.model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in view.model.modules())
    assert torch.equal(logits(view), before)


@every_family
def test_names_and_the_view_go_on_working_while_attached(family):
    view = pruned(family)
    names = [name for name, _ in view.model.named_modules()]
    with Adapters(view, 2, 4) as adapters:
        assert [name for name, _ in view.model.named_modules()] == names
        assert [layer.spec for layer in BlockView(view.model).layers] == [layer.spec for layer in view.layers]
        listed = {id(parameter) for parameter in view.model.parameters() if parameter.requires_grad}
        assert listed == {id(parameter) for parameter in adapters.parameters()}
        own = len(adapters.layers)
        assert own + len(adapters.skipped) == len(view.layers)
        assert {item.name for item in adapters.skipped} == {x.spec.name for x in view.layers if x.expert is not None}
        specs = [layer.spec for layer in adapters.layers]
        assert adapters.num_trainable() == sum(2 * (spec.in_features + spec.out_features) for spec in specs)


@every_family
def test_gradients_are_those_of_the_masked_formula(family):
    """Against a model whose weight is a differentiable function of A and B."""
    view = pruned(family)
    with trained(Adapters(view, 3, 3)) as adapters:
        found = torch.autograd.grad(loss(view), adapters.parameters())
        pairs = list(zip(adapters.parameters()[::2], adapters.parameters()[1::2], strict=True))
        values = [(a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()) for a, b in pairs]
        layers = adapters.layers
    replaced = {}
    for layer, (a, b) in zip(layers, values, strict=True):
        whole = layer.weight + 2 * (layer.weight != 0) * (b @ a)
        replaced[layer.stored_name] = layer.oriented(whole)
    output = torch.func.functional_call(view.model, replaced, (TOKENS,), {"labels": TOKENS, "use_cache": False})
    expected = torch.autograd.grad(output.loss, [factor for pair in values for factor in pair])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max() + 1))


@pytest.fixture(params=["llama", "gpt2"])
def oracle(request):
    """PEFT on the same dense weights with the same A and B, and ours."""
    peft = pytest.importorskip("peft")
    view = pruned(request.param, sparsity=0)
    targets = sorted({layer.spec.name.rsplit(".", 1)[-1] for layer in view.layers})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=request.param == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(view.model), config)
    return view, theirs


def their_factors(theirs, name):
    module = theirs.get_submodule(f"base_model.model.{name}")
    return module.lora_A["default"].weight, module.lora_B["default"].weight


@pytest.mark.parametrize("masked", [True, False])
def test_peft_computes_the_same_at_a_full_mask_and_a_constant_rank(oracle, masked):
    view, theirs = oracle
    with trained(Adapters(view, 4, 4, scale=2.0, masked=masked)) as adapters:
        with torch.no_grad():
            for layer, a, b in zip(adapters.layers, *(adapters.parameters()[i::2] for i in (0, 1)), strict=True):
                for mine, other in zip((a, b), their_factors(theirs, layer.spec.name), strict=True):
                    assert mine.shape == other.shape
                    other.copy_(mine)
        output = theirs(TOKENS, labels=TOKENS, use_cache=False)
        torch.testing.assert_close(logits(view), output.logits.detach(), rtol=1e-4, atol=1e-4)
        others = [factor for layer in adapters.layers for factor in their_factors(theirs, layer.spec.name)]
        expected = torch.autograd.grad(output.loss, others)
        for one, other in zip(torch.autograd.grad(loss(view), adapters.parameters()), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
        adapters.merge()
    merged = weights(BlockView(theirs.merge_and_unload()))
    for name, weight in weights(view).items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)


def test_fresh_components_are_as_pefts(oracle):
    view, theirs = oracle
    adapters = Adapters(view, 4, 6)
    for layer, a, b in zip(adapters.layers, *(adapters.parameters()[i::2] for i in (0, 1)), strict=True):
        their_a, their_b = their_factors(theirs, layer.spec.name)
        bound = layer.spec.in_features**-0.5
        for values in (a[:4], their_a):
            assert 0.9 * bound < values.abs().max() <= bound
        assert not a[4:].any()
        assert not b.any()
        assert not their_b.any()
    adapters.detach()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("near", [True, False], ids=["on the device", "on the host"])
def test_ten_merges_move_no_bit(family, near, monkeypatch):
    monkeypatch.setattr("sparsify.recovery.adapters.fits", lambda view, size: near)
    view = pruned(family, torch.bfloat16)
    before = weights(view)
    with trained(Adapters(view, 3, 5)) as adapters:
        for _ in range(10):
            adapters.merge()
            adapters.unmerge()
        assert same_bits(weights(view), before)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_a_score_keeps_come_back_as_they_were(family, pruner):
    view = pruned(family, torch.bfloat16, sparsity=0.3)
    before = weights(view)
    with trained(Adapters(view, 3, 5)) as adapters:
        adapters.merge()
        sparsify.prune(view.model, TOKENS, pruner=pruner, sparsity=0.6)
        kept = {layer.spec.name: layer.weight != 0 for layer in view.layers}
        adapters.unmerge()
        for layer in view.layers:
            expected = torch.where(kept[layer.spec.name], before[layer.spec.name], 0)
            assert torch.equal(layer.weight, expected)
    assert view.sparsity() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_sparsegpt_moved_compute_what_it_left(family):
    view = pruned(family, torch.bfloat16, sparsity=0.3)
    before = weights(view)
    with trained(Adapters(view, 3, 5)) as adapters:
        factors = [factor.detach().clone() for factor in adapters.parameters()]
        adapters.merge()
        sparsify.prune(view.model, TOKENS, pruner="sparsegpt", sparsity=0.6)
        left = weights(view)
        adapters.unmerge()
        moved = 0
        for layer, a, b in zip(adapters.layers, factors[::2], factors[1::2], strict=True):
            now, was = layer.weight, left[layer.spec.name]
            assert torch.equal(now == 0, was == 0)
            exact = was.double() - 2.0 * (b[:, :3].double() @ a[:3].double())
            near = (now.double() - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps + 1e-6
            assert (near | (was == 0) | (now == before[layer.spec.name])).all()
            moved += int((near & (was != 0) & (now != before[layer.spec.name])).sum())
        assert moved > 1000


def test_what_becomes_zero_by_merging_is_not_pruned_for_ever():
    view = pruned(sparsity=0.5)
    with Adapters(view, 1, 1, scale=1.0) as adapters:
        layer, (a, b) = view.layers[0], adapters.parameters()[:2]
        with torch.no_grad():
            layer.weight[0, 0], a[0, 0], b[0, 0] = 0.5, 1.0, -0.5
        adapters.merge()
        assert layer.weight[0, 0] == torch.finfo(torch.float32).tiny
        adapters.unmerge()
        assert layer.weight[0, 0] == 0.5


def test_growing_keeps_what_was_trained_and_adds_what_changes_nothing():
    view = pruned()
    with trained(Adapters(view, 3, 16)) as adapters:
        for b in adapters.parameters()[1::2]:
            b.data[:, 3:] = 7.0  # nothing that stands in components not in use may come in
        before, factors = logits(view), [factor.detach().clone() for factor in adapters.parameters()]
        adapters.set_ranks({0: 12, 1: 3, 2: 5})
        torch.testing.assert_close(logits(view), before, rtol=1e-4, atol=1e-4)
        for a, b, old_a, old_b in zip(
            *(p[i::2] for p in (adapters.parameters(), factors) for i in (0, 1)), strict=True
        ):
            assert torch.equal(a[:3], old_a[:3])
            assert torch.equal(b[:, :3], old_b[:, :3])
        assert adapters.ranks == {0: 12, 1: 3, 2: 5}


def test_all_of_twelve_components_train_and_no_other():
    view = pruned()
    with Adapters(view, 12, 16) as adapters:
        for _ in range(2):  # B moves first, then A has a gradient
            optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
            optimiser.zero_grad()
            loss(view).backward()
            optimiser.step()
        for a, b in zip(adapters.parameters()[::2], adapters.parameters()[1::2], strict=True):
            assert a.grad[:12].any(dim=1).all()
            assert b.grad[:, :12].any(dim=0).all()
            assert not a.grad[12:].any()
            assert not b.grad[:, 12:].any()
            assert torch.linalg.matrix_rank(b.detach() @ a.detach()) == 12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_shrinking_with_keep_leaves_the_function(dtype, tolerance):
    view = pruned(dtype=dtype)
    zeros = {name: weight == 0 for name, weight in weights(view).items()}
    plain = logits(view)
    with trained(Adapters(view, 6, 8)) as adapters:
        before = logits(view)
        adapters.set_ranks({0: 2, 1: 6, 2: 1})
        assert (logits(view) - before).float().norm() < 3 * tolerance * (before - plain).float().norm()
        for layer in view.layers:
            assert torch.equal(layer.weight == 0, zeros[layer.spec.name])
        shrunk = logits(view)
        adapters.set_ranks(8)
        assert (logits(view) - shrunk).float().norm() < tolerance * (before - plain).float().norm()
        assert adapters.parameters()[0][2:].any(dim=1).all()  # fresh, to be trained


def test_shrinking_as_the_release_sets_components_aside():
    view = pruned()
    with trained(Adapters(view, 6, 8)) as adapters:
        before, found = logits(view), weights(view)
        adapters.set_ranks(2, keep=False)
        assert same_bits(weights(view), found)
        assert not torch.allclose(logits(view), before, rtol=1e-3, atol=1e-3)
        adapters.set_ranks(6, keep=False)
        assert torch.equal(logits(view), before)


def test_dropout_is_on_the_adapters_input_alone_and_only_in_training():
    view = pruned()
    with trained(Adapters(view, 3, 3, dropout=0.5)) as adapters:
        evaluated = logits(view)
        torch.testing.assert_close(evaluated, logits(view))
        layer = view.layers[0]
        x, (a, b) = torch.randn(4, layer.spec.in_features), adapters.parameters()[:2]
        delta = 2.0 * (layer.weight != 0) * (b @ a).detach()
        layer.module.train()
        torch.manual_seed(5)
        y = layer.module(x)
        torch.manual_seed(5)
        dropped = nn.functional.dropout(x, 0.5)
        torch.testing.assert_close(y, x @ layer.weight.T + dropped @ delta.T)
        y.sum().backward()
        expected = 2.0 * b.detach().T @ (dropped.sum(dim=0) * (layer.weight != 0))
        torch.testing.assert_close(a.grad, expected)


def test_activation_checkpointing_of_the_model_changes_nothing():
    view = pruned()
    with trained(Adapters(view, 3, 3)) as adapters:
        expected = torch.autograd.grad(loss(view), adapters.parameters())
        with recomputing(view.blocks):
            found = torch.autograd.grad(loss(view), adapters.parameters())
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_data_parallel_training_reduces_the_gradients_of_adapters(tmp_path):
    view = pruned()
    with trained(Adapters(view, 3, 5)) as adapters:
        expected = torch.autograd.grad(loss(view), adapters.parameters())
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(view.model)
            parallel(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        for parameter, gradient in zip(adapters.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)


def test_no_dense_matrix_is_kept_for_the_backward_pass():
    view = pruned()
    own = {parameter.untyped_storage().data_ptr() for parameter in view.model.parameters()}
    sizes = {layer.weight.shape for layer in view.layers} | {layer.weight.T.shape for layer in view.layers}
    with trained(Adapters(view, 3, 5)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss(view)
    assert kept
    assert not [t.shape for t in kept if t.shape in sizes and t.untyped_storage().data_ptr() not in own]


def test_a_dense_adapter_fills_zeros_when_it_is_merged():
    view = pruned()
    with trained(Adapters(view, 3, 3, masked=False)) as adapters:
        before, adapted = weights(view), logits(view)
        adapters.merge()
        torch.testing.assert_close(logits(view), adapted, rtol=1e-3, atol=1e-3)
        assert view.sparsity() < 0.001
        adapters.unmerge()
        assert same_bits(weights(view), before)


def test_a_copy_of_the_model_has_adapters_of_its_own():
    view = pruned()
    with trained(Adapters(view, 3, 3)) as adapters:
        other = copy.deepcopy(view.model)
        before = logits(view)
        for b in adapters.parameters()[1::2]:
            b.data.zero_()
        assert torch.equal(other(TOKENS, use_cache=False).logits, before)


def test_a_forward_that_something_else_put_there_is_called_and_put_back():
    view, calls = pruned(), []
    module = view.layers[0].module
    own = module.forward
    module.forward = replaced = lambda x: calls.append(1) or own(x)
    with Adapters(view, 2, 2, masked=False) as adapters:
        logits(view)
        assert len(calls) == 1
        adapters.merge()
        assert module.forward is replaced
    assert module.forward is replaced


def test_a_state_goes_through_a_file_and_back():
    view = pruned()
    with trained(Adapters(view, 3, 8)) as adapters:
        adapters.set_ranks({0: 1, 1: 3, 2: 5})
        expected, file = logits(view), io.BytesIO()
        torch.save(adapters.state_dict(), file)
        adapters.set_ranks(7)
        grown = logits(view), adapters.parameters()[0].clone()
    file.seek(0)
    with Adapters(view, 8, 8, seed=99) as again:
        again.load_state_dict(torch.load(file, weights_only=True))
        assert again.ranks == {0: 1, 1: 3, 2: 5}
        assert torch.equal(logits(view), expected)
        again.set_ranks(7)
        assert torch.equal(logits(view), grown[0])
        assert torch.equal(again.parameters()[0], grown[1])


def test_the_seed_decides_what_a_starts_from():
    view = pruned()

    def start(seed):
        with Adapters(view, 2, 2, seed=seed) as adapters:
            return [a.detach().clone() for a in adapters.parameters()[::2]]

    one, same, other = start(0), start(0), start(1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "ranks", [0, 9, {0: 1, 1: 2}, {0: 1, 1: 1, 2: 9}, {0: 1, 1: 1, 2: 1, 3: 1}, {0: 1, 1: 1, 2: 1.0}]
)
def test_ranks_out_of_bounds_or_of_other_blocks_are_refused(ranks):
    view = pruned()
    with pytest.raises(UsageError, match="rank"):
        Adapters(view, ranks, 8)
    with Adapters(view, 4, 8) as adapters, pytest.raises(UsageError, match="rank"):
        adapters.set_ranks(ranks)


def test_nothing_happens_to_adapters_while_they_are_merged():
    view = pruned()
    with Adapters(view, 4, 8) as adapters:
        state = adapters.state_dict()
        with pytest.raises(UsageError, match="merged"):
            adapters.unmerge()
        adapters.merge()
        for forbidden in (
            adapters.merge,
            adapters.state_dict,
            lambda: adapters.set_ranks(2),
            lambda: adapters.load_state_dict(state),
        ):
            with pytest.raises(UsageError, match="unmerged before"):
                forbidden()
        with torch.no_grad():
            adapters.parameters()[0].add_(1)
        with pytest.raises(UsageError, match="changed since"):
            adapters.unmerge()


def test_two_sets_of_adapters_at_once_are_refused():
    view = pruned()
    with Adapters(view, 4, 8), pytest.raises(UsageError, match="already"):
        Adapters(view, 4, 8)


def test_a_state_of_other_adapters_is_refused():
    view = pruned()
    with Adapters(view, 4, 8) as adapters:
        state = adapters.state_dict()
    with Adapters(view, 4, 9) as adapters, pytest.raises(UsageError, match="rank_max"):
        adapters.load_state_dict(state)


def test_a_weight_that_overflows_is_named_and_nothing_is_merged():
    view = pruned(dtype=torch.float16)
    before = weights(view)
    with trained(Adapters(view, 4, 8)) as adapters:
        adapters.parameters()[9].data.fill_(1e6)
        with pytest.raises(NumericsError, match=view.layers[4].spec.name):
            adapters.merge()
        assert not adapters.merged
        assert same_bits(weights(view), before)


def test_a_model_of_nothing_but_fused_experts_is_refused():
    view = pruned("mixtral")
    view.layers = [layer for layer in view.layers if layer.expert is not None]
    with pytest.raises(UnsupportedModelError, match="low-rank"):
        Adapters(view, 4, 8)
