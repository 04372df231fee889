"""The Fisher trace against plain autograd, a window at a time."""

import pytest
import torch
from fakes import state_of
from families import FAMILIES, MIXTURES

from sparsify.analysis.fisher import DIAGONAL, fisher_traces
from sparsify.data.inputs import TokenInputs
from sparsify.errors import NumericsError
from sparsify.model import gradients
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import gradient_statistics
from sparsify.model.objective import NextToken


def squares(view, tokens):
    """Mean over windows of the squared gradient of a window's mean loss, by layer name."""
    found = {layer.spec.name: 0.0 for layer in view.layers}
    for window in tokens:
        loss = view.model(window[None], labels=window[None]).loss
        stored = list(dict.fromkeys(layer.stored for layer in view.layers))
        by_parameter = dict(zip(stored, torch.autograd.grad(loss, stored), strict=True))
        for layer in view.layers:
            found[layer.spec.name] += layer.oriented(by_parameter[layer.stored]).double().square() / len(tokens)
    return found


@pytest.mark.parametrize("large", [False, True], ids=["kept activations", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_trace_is_the_sum_of_squares_of_single_windows(family, tokens, monkeypatch, large):
    monkeypatch.setattr(gradients, "LARGE", 0 if large else 10**9)
    view = BlockView((FAMILIES | MIXTURES)[family].build())
    traces = fisher_traces(view, TokenInputs(tokens), NextToken())
    expected = squares(view, tokens)
    assert traces.keys() == expected.keys()
    for name, square in expected.items():
        assert traces[name] == pytest.approx(float(square.sum()), rel=1e-5)


def test_the_trace_is_that_of_the_diagonal_and_not_of_the_mean_gradient(make_model, tokens):
    view, inputs = BlockView(make_model()), TokenInputs(tokens)
    diagonal = gradient_statistics(view, inputs, frozenset({DIAGONAL}), NextToken())
    traces = fisher_traces(view, inputs, NextToken())
    mean = view.model(tokens, labels=tokens).loss
    of_mean = torch.autograd.grad(mean, [layer.stored for layer in view.layers])
    expected = squares(view, tokens)
    for layer, gradient in zip(view.layers, of_mean, strict=True):
        name = layer.spec.name
        torch.testing.assert_close(diagonal[name][DIAGONAL].double(), expected[name], rtol=1e-4, atol=1e-10)
        assert float(diagonal[name][DIAGONAL].sum()) == pytest.approx(traces[name], rel=1e-5)
        assert float(gradient.square().sum()) < 0.9 * traces[name]


def test_windows_are_averaged(make_model, tokens):
    view = BlockView(make_model())
    whole = fisher_traces(view, TokenInputs(tokens), NextToken())
    parts = [fisher_traces(view, TokenInputs(window[None]), NextToken()) for window in tokens]
    for name, trace in whole.items():
        assert trace == pytest.approx(sum(part[name] for part in parts) / len(parts), rel=1e-9)


def test_half_precision_gives_the_trace_of_single(make_model, tokens):
    single = fisher_traces(BlockView(make_model()), TokenInputs(tokens), NextToken())
    half = fisher_traces(BlockView(make_model().half()), TokenInputs(tokens), NextToken())
    for name, trace in single.items():
        assert half[name] == pytest.approx(trace, rel=0.03)


@pytest.mark.parametrize("factor", [1e-7, 300.0], ids=["vanish unscaled", "overflow scaled by 1024"])
def test_half_precision_neither_underflows_nor_overflows(make_model, tokens, factor):
    traces = [
        fisher_traces(BlockView(model), TokenInputs(tokens), _Scaled(factor))
        for model in (make_model(), make_model().half())
    ]
    for name, trace in traces[0].items():
        assert traces[1][name] == pytest.approx(trace, rel=0.05)


class _Scaled(NextToken):
    """The loss of next tokens times a factor."""

    def __init__(self, factor):
        object.__setattr__(self, "factor", factor)

    def prepare(self, model, inputs):
        loss = super().prepare(model, inputs)
        return lambda model, batch: loss(model, batch) * self.factor


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_as_it_was(make_model, tokens, breaks):
    view = BlockView(make_model())
    view.layers[0].stored.requires_grad_(False)
    view.layers[1].stored.grad = mine = torch.ones_like(view.layers[1].stored)
    before, weights = state_of(view.model), [layer.weight.clone() for layer in view.layers]
    if breaks:
        with pytest.raises(NumericsError, match=r"down_proj is not finite"):
            fisher_traces(view, TokenInputs(tokens), _Scaled(float("inf")))
    else:
        fisher_traces(view, TokenInputs(tokens), NextToken())
    assert state_of(view.model) == before
    assert view.layers[1].stored.grad is mine
    assert all(torch.equal(layer.weight, w) for layer, w in zip(view.layers, weights, strict=True))
