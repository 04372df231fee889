"""Restoring the dense model undoes everything that a method or a stage may have done to it."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsify.model.blocks import BlockView


class Adapted(nn.Module):
    """A linear layer with a low-rank product beside it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def prune(model):
    for layer in BlockView(model).layers:
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.5)


def change_norms(model):
    model.model.norm.weight.data.add_(1.0)
    model.model.layers[0].input_layernorm.weight.data = torch.zeros(32)


def add_adapters(model):
    model.model.layers[1].mlp.up_proj = Adapted(model.model.layers[1].mlp.up_proj)
    model.model.layers[1].mlp.up_proj.linear.weight.data.zero_()


def replace_module(model):
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32)


def add_things(model):
    model.model.layers[0].register_parameter("gate", nn.Parameter(torch.ones(1)))
    model.model.layers[0].register_buffer("mask", torch.ones(1))
    model.model.layers[0].extra = nn.Linear(2, 2)


def remove_things(model):
    del model.model.layers[1].mlp


def hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: torch.zeros(1, 12, 32))
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)


def replace_forward(model):
    model.model.layers[0].forward = lambda hidden, **_: torch.zeros_like(hidden)


def parametrise(model):
    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", Doubled())


def train(model):
    model.train()
    model.requires_grad_(False)


def cast(model):
    model.to(torch.bfloat16)


def buffers(model):
    for buffer in model.buffers():
        buffer.zero_()


CHANGES = [prune, change_norms, add_adapters, replace_module, add_things, remove_things, hook, replace_forward]
CHANGES += [parametrise, train, cast, buffers]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("tied", [False, True])
def test_a_snapshot_undoes_it(make_model, tokens, change, tied):
    model = make_model(tie_word_embeddings=tied)
    view, flags = BlockView(model), [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = model(tokens).logits.detach()
    dense = view.snapshot()
    with torch.no_grad():
        change(model)
    view.restore(dense)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(tokens).logits, before)
    assert not model.training
    assert not dense.changed()


def test_a_snapshot_gives_the_dense_weights_by_layer(make_model):
    view = BlockView(make_model())
    before = {layer.spec.name: layer.weight.clone() for layer in view.layers}
    dense = view.snapshot()
    prune(view.model)
    assert list(dense) == list(before)
    assert all(torch.equal(dense[name], weight) for name, weight in before.items())
    assert set(dense.changed()) == {f"{name}.weight" for name in before}


def test_a_transposed_weight_is_given_as_out_by_in():
    from families import FAMILIES

    view = BlockView(FAMILIES["gpt2"].build())
    dense = view.snapshot()
    assert all(torch.equal(dense[layer.spec.name], layer.weight) for layer in view.layers)


def test_parameters_that_were_not_there_are_no_change_but_an_error(make_model):
    view = BlockView(make_model())
    dense = view.snapshot()
    add_adapters(view.model)
    with pytest.raises(KeyError, match="up_proj"):
        dense.changed()
