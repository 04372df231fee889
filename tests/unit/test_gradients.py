import pytest
import torch

from sparsify.model import gradients
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import layer_gradients


@pytest.fixture
def view(make_model):
    return BlockView(make_model(num_hidden_layers=3))


def loss_of(view, tokens):
    return lambda: view.model(tokens, labels=tokens).loss


def by_autograd(view, tokens):
    weights = [layer.module.weight for layer in view.layers]
    found = torch.autograd.grad(loss_of(view, tokens)(), weights)
    return {layer.spec.name: layer.oriented(g) for layer, g in zip(view.layers, found, strict=True)}


def collected(view, tokens):
    found = {}
    layer_gradients(view, loss_of(view, tokens), lambda layer, g: found.update({layer.spec.name: g.clone()}))
    return found


@pytest.mark.parametrize("large", [False, True], ids=["kept activations", "recomputed"])
def test_every_gradient_is_autograds_to_the_last_bit(view, tokens, monkeypatch, large):
    monkeypatch.setattr(gradients, "LARGE", 0 if large else 10**9)
    expected, found = by_autograd(view, tokens), collected(view, tokens)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_transposed_weight_has_its_gradient_as_out_by_in(tokens):
    from families import FAMILIES

    view = BlockView(FAMILIES["gpt2"].build())
    found = collected(view, tokens)
    assert all(found[x.spec.name].shape == x.weight.shape for x in view.layers)


def test_gradients_come_one_at_a_time_and_are_dropped(view, tokens):
    held = []

    def fold(layer, gradient):
        held.append(sum(x.module.weight.grad is not None for x in view.layers))

    layer_gradients(view, loss_of(view, tokens), fold)
    assert held == [0] * len(view.layers)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_as_it_was(view, tokens, monkeypatch, large, breaks):
    monkeypatch.setattr(gradients, "LARGE", 0 if large else 10**9)
    layers = view.layers
    layers[0].module.weight.requires_grad_(False)
    layers[1].module.weight.grad = mine = torch.ones_like(layers[1].module.weight)
    flags = [p.requires_grad for p in view.model.parameters()]

    def fold(layer, gradient):
        if breaks:
            raise ZeroDivisionError

    if breaks:
        with pytest.raises(ZeroDivisionError):
            layer_gradients(view, loss_of(view, tokens), fold)
    else:
        layer_gradients(view, loss_of(view, tokens), fold)
    assert [p.requires_grad for p in view.model.parameters()] == flags
    assert layers[1].module.weight.grad is mine
    assert view.model.model.embed_tokens.weight.grad is None
    assert not any("forward" in vars(block) for block in view.blocks)
    assert not any(x.module.weight._post_accumulate_grad_hooks for x in layers if x.module.weight.grad is None)
