"""Group Taylor importance against its formula in plain loops and double precision."""

import copy

import pytest
import torch
from families import FAMILIES

from sparsify.data.inputs import as_inputs
from sparsify.model.blocks import BlockView
from sparsify.model.coupled import coupled_of
from sparsify.model.objective import NextToken
from sparsify.pruners import taylor
from sparsify.pruners.taylor import Salience, importances, most_important

TOKENS = torch.randint(3, 96, (5, 9), generator=torch.Generator().manual_seed(4))


def literal(model, tokens, order, reduction):
    """Every unit's importance, from one backward pass of the mean loss in double precision."""
    model = copy.deepcopy(model).double()
    for weight in model.parameters():
        weight.requires_grad_(True)
    model(tokens, labels=tokens).loss.backward()
    found = []
    for block in model.model.layers:
        attention, mlp, dim = block.self_attn, block.mlp, block.self_attn.head_dim
        shared = attention.num_key_value_groups
        for unit in range(attention.k_proj.out_features // dim):
            queries = range(unit * shared * dim, (unit + 1) * shared * dim)
            keys = range(unit * dim, (unit + 1) * dim)
            rows = [(attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)]
            found.append(group(rows, (attention.o_proj, queries), order, reduction))
        for unit in range(mlp.down_proj.in_features):
            rows = [(mlp.gate_proj, [unit]), (mlp.up_proj, [unit])]
            found.append(group(rows, (mlp.down_proj, [unit]), order, reduction))
    return found


def group(rows, columns, order, reduction):
    parts = [sum(one(m.weight[i], m.weight.grad[i], order) for i in where) for m, where in rows]
    reader, where = columns
    parts.append(sum(one(reader.weight[:, j], reader.weight.grad[:, j], order) for j in where))
    return {"sum": sum, "max": max, "mean": lambda values: sum(values) / len(values)}[reduction](parts)


def one(weight, gradient, order):
    weight = weight.detach()
    if order == "vector":
        return abs(sum(float(w * g) for w, g in zip(weight, gradient, strict=True)))
    return sum(abs(float(w * g)) for w, g in zip(weight, gradient, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("order", taylor.ORDERS)
@pytest.mark.parametrize("reduction", taylor.REDUCTIONS)
def test_importance_is_the_formula_in_plain_loops(make_model, order, reduction, batch_size):
    model = make_model()
    view = BlockView(model)
    options = {"order": order, "reduction": reduction, "batch_size": batch_size}
    found = importances(view, coupled_of(view), as_inputs(TOKENS), NextToken(), **options)
    expected = torch.tensor(literal(model, TOKENS, order, reduction), dtype=torch.float32)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-3, atol=1e-6)


def test_a_model_in_double_precision_agrees_with_the_formula_too(make_model):
    model = make_model().double()
    view = BlockView(model)
    found = importances(view, coupled_of(view), as_inputs(TOKENS), NextToken(), batch_size=5)
    expected = torch.tensor(literal(model, TOKENS, "element", "sum"), dtype=torch.float32)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", taylor.ORDERS)
def test_of_a_single_batch_one_gradient_is_kept_at_a_time(make_model, monkeypatch, order):
    """By vector never more than a row's sums; by element the last batch drops each as it comes."""
    view, held, fold = BlockView(make_model()), [], Salience.fold

    def watched(self, gradient, samples):
        fold(self, gradient, samples)
        held.append(0 if self._sum is None else self._sum.numel())

    monkeypatch.setattr(Salience, "fold", watched)
    importances(view, coupled_of(view), as_inputs(TOKENS), NextToken(), order=order, batch_size=5)
    assert held == [0] * len(view.layers)
    held.clear()
    importances(view, coupled_of(view), as_inputs(TOKENS), NextToken(), order=order, batch_size=3)
    largest = max(x.numel for x in view.table) if order == "element" else max(x.out_features for x in view.table)
    assert max(held[: len(view.layers)]) == largest
    assert held[len(view.layers) :] == [0] * len(view.layers)


def test_the_model_keeps_no_gradient_and_no_flag():
    model = FAMILIES["qwen2"].build()
    model.requires_grad_(False)
    view = BlockView(model)
    importances(view, coupled_of(view), as_inputs(TOKENS), NextToken())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_most_important_stay_in_their_order_and_of_equals_the_later_ones():
    assert most_important(torch.tensor([3.0, 1.0, 5.0, 1.0]), 3) == [0, 2, 3]
    assert most_important(torch.ones(4), 2) == [2, 3]
    assert most_important(torch.ones(4), 4) == [0, 1, 2, 3]
