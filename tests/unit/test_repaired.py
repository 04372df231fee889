import numpy as np
import pytest
import torch

import sparsify
from sparsify.data.inputs import as_inputs
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken
from sparsify.pruners.least_squares import LeastSquares
from sparsify.pruners.sparsegpt import SparseGPT
from sparsify.pruners.wanda import Wanda
from sparsify.search.repaired import Path, RepairedProxy
from sparsify.types import Target


def proxy_of(model, tokens, pruner, **options):
    view = BlockView(model)
    return RepairedProxy(view, view.snapshot(), as_inputs(tokens), NextToken(), pruner=pruner, **options)


def everywhere(proxy, target):
    return {layer.name: target for layer in proxy.view.table}


@pytest.mark.parametrize("pruner", [SparseGPT(), LeastSquares(), Wanda()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, 2, 4)], ids=str)
def test_a_settled_model_is_the_one_that_pruning_gives(make_model, tokens, pruner, target):
    proxy = proxy_of(make_model(), tokens, pruner, group=target.group)
    proxy.settle(everywhere(proxy, target))
    pruned, pattern = make_model(), "unstructured" if target.group is None else "2:4"
    sparsify.prune(pruned, tokens, pruner=pruner, sparsity=0.5, pattern=pattern)
    for ours, theirs in zip(proxy.view.layers, BlockView(pruned).layers, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_between_settled_plans_weights_lie_on_straight_lines_and_end_with_them(make_model, tokens):
    proxy = proxy_of(make_model(), tokens, SparseGPT(), reach=0.1)
    proxy.settle(everywhere(proxy, Target(0.5)))
    layer = proxy.view.layers[0]
    path = proxy.paths[layer.spec.name]
    for sparsity, wanted in {
        0.5: path.weights[1],
        0.4: path.weights[0],
        0.3: path.weights[0],
        0.6: path.weights[2],
        0.55: (path.weights[1] + path.weights[2]) / 2,
    }.items():
        proxy.apply(everywhere(proxy, Target(sparsity)))
        torch.testing.assert_close(layer.weight.data, wanted, atol=1e-3, rtol=1e-3)


def test_a_path_without_a_step_has_no_slope():
    weight = torch.ones(2, 2)
    path = Path((weight, weight, weight), (1, 1, 1))
    assert torch.equal(path.at(3), weight)
    assert not path.slope().any()


@pytest.mark.parametrize("pruner", [SparseGPT(), LeastSquares(0.5)], ids=lambda pruner: type(pruner).__name__)
def test_costs_are_derivatives_of_the_loss_by_the_number_of_zeros(make_model, tokens, pruner):
    proxy, text = proxy_of(make_model(), tokens, pruner, reach=0.05), as_inputs(tokens)
    proxy.settle(everywhere(proxy, Target(0.5)))
    costs, pairs = proxy.marginal_costs(text, 0.1), []
    for layer in proxy.view.table:
        around = []
        for sparsity in (0.55, 0.45):
            proxy.apply(everywhere(proxy, Target(0.5)) | {layer.name: Target(sparsity)})
            around.append(proxy.loss(text))
        zeros = proxy.paths[layer.name].zeros
        pairs.append((costs[layer.name], (around[0] - around[1]) / (zeros[2] - zeros[0])))
    ours, slopes = np.array(pairs).T
    assert np.corrcoef(ours, slopes)[0, 1] > 0.9


def test_what_others_make_up_for_costs_less(make_model, tokens):
    """With weights that are only masked a zero costs more than where the rest is fitted again."""
    text, sums = as_inputs(tokens), []
    for pruner in (Wanda(group="matrix"), LeastSquares(0.0)):
        proxy = proxy_of(make_model(), tokens, pruner, reach=0.05)
        proxy.settle(everywhere(proxy, Target(0.7)))
        sums.append(proxy.loss(text))
    assert sums[1] < sums[0]


@pytest.mark.parametrize("pattern", ["unstructured", "mixed:4"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "least_squares"])
def test_a_descent_by_the_pruner_at_hand_meets_the_budget_and_leaves_the_model_to_it(
    make_model, tokens, pattern, pruner
):
    options = {"own": True, "native": pattern != "unstructured", "steps": 4, "settle_every": 2, "batch": 2, "rate": 0.1}
    result = sparsify.prune(
        make_model(),
        tokens,
        pruner=pruner,
        allocator=("equimarginal", options),
        sparsity=0.5,
        pattern=pattern,
        heldout=tokens,
    )
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    tried = [trial["heldout_perplexity"] for trial in result.plan.trials]
    assert len(set(tried)) == 3
    assert result.notes["heldout_perplexity"] == pytest.approx(min(tried))
