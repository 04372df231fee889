"""Pruner-Zero and GBLM: formulas in plain loops, on gradients that autograd takes sample by sample."""

import math

import pytest
import torch
from families import MIXTURES
from torch import nn

import sparsify
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.blockwise import prune_layer
from sparsify.model.blocks import BlockView
from sparsify.model.prunable import Layer
from sparsify.model.statistics import NORM, Accumulator, LayerStats
from sparsify.pruners.gblm import GBLM, GRADIENT
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.pruner_zero import PrunerZero
from sparsify.pruners.wanda import Wanda
from sparsify.types import LayerSpec, Target

ROWS, INPUTS, SAMPLES = 6, 16, 5


def norms_of(gradients):
    """Root of the sum over samples of every entry's square, as nested lists."""
    lists = [g.double().tolist() for g in gradients]
    rows, columns = len(lists[0]), len(lists[0][0])
    return [[math.sqrt(sum(g[i][j] ** 2 for g in lists)) for j in range(columns)] for i in range(rows)]


def pruner_zero(weight, gradients, windows):
    norms = norms_of(gradients)
    low, high = min(map(min, norms)), max(map(max, norms))
    return [
        [abs(w * w) * ((n - low) / (high - low)) for w, n in zip(row, line, strict=True)]
        for row, line in zip(weight.double().tolist(), norms, strict=True)
    ]


def gblm(weight, gradients, windows, alpha=100.0):
    norms, tokens = norms_of(gradients), [x.double().tolist() for x in windows]
    inputs = [math.sqrt(sum(row[j] ** 2 for x in tokens for row in x) / len(tokens)) for j in range(weight.shape[1])]
    return [
        [abs(w) * (inputs[j] + alpha * norms[i][j]) for j, w in enumerate(row)]
        for i, row in enumerate(weight.double().tolist())
    ]


def without_lowest(scores, width, count):
    """Mask that drops the `count` lowest of every `width` consecutive scores of a row."""
    mask = [[True] * len(row) for row in scores]
    for i, row in enumerate(scores):
        for start in range(0, len(row), width):
            for j in sorted(range(start, start + width), key=row.__getitem__)[:count]:
                mask[i][j] = False
    return torch.tensor(mask)


BOTH = [(PrunerZero(), pruner_zero), (GBLM(), gblm), (GBLM(alpha=7.0), lambda *a: gblm(*a, alpha=7.0))]


@pytest.fixture
def matrix():
    """A weight, the gradient of every sample's own loss by it, and what enters it: [ROWS, INPUTS], [tokens, INPUTS]."""
    weight = torch.randn(ROWS, INPUTS, requires_grad=True)
    windows = [torch.randn(7, INPUTS) * torch.rand(INPUTS) for _ in range(SAMPLES)]
    losses = [(x @ weight.T - torch.randn(7, ROWS)).square().mean() for x in windows]
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    return weight.detach(), gradients, windows


def stats_of(gradients, windows):
    inputs, known = Accumulator(frozenset({NORM})), Accumulator(frozenset({GRADIENT}))
    for x, gradient in zip(windows, gradients, strict=True):
        inputs.fold(x[None], 1)
        known.fold(gradient, 1)
    return inputs.finalise(SAMPLES).joined(known.finalise(SAMPLES))


@pytest.mark.parametrize(("pruner", "score"), BOTH)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_the_score_is_that_of_the_release(pruner, score, sparsity, matrix):
    weight, gradients, windows = matrix
    pruned = pruner.prune(weight, stats_of(gradients, windows), Target(sparsity))
    expected = without_lowest(score(weight, gradients, windows), INPUTS, math.floor(sparsity * INPUTS))
    assert torch.equal(pruned.keep, expected)
    assert torch.equal(pruned.weight, torch.where(expected, weight, torch.zeros(())))


@pytest.mark.parametrize(("pruner", "score"), BOTH)
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (5, 8)])
def test_n_of_m_keeps_exactly_n(pruner, score, kept, group, matrix):
    weight, gradients, windows = matrix
    pruned = pruner.prune(weight, stats_of(gradients, windows), Target(1 - kept / group, kept, group))
    assert torch.equal(pruned.keep, without_lowest(score(weight, gradients, windows), group, group - kept))
    assert (pruned.keep.reshape(-1, group).sum(dim=1) == kept).all()


def sample_gradients(model, tokens):
    """Of every window's mean loss, by the weight of every layer of the model as it stands, by name."""
    layers = BlockView(model).layers
    found = {layer.spec.name: [] for layer in layers}
    for window in tokens:
        loss = model(window[None], labels=window[None]).loss
        gradients = torch.autograd.grad(loss, [layer.module.weight for layer in layers])
        for layer, gradient in zip(layers, gradients, strict=True):
            found[layer.spec.name].append(gradient)
    return found


def entering(model, tokens):
    """What every window puts into every layer of the model as it stands, by name."""
    found = {}

    def keep(name):
        return lambda _m, args: found.setdefault(name, []).append(args[0][0].detach().clone())

    handles = [x.module.register_forward_pre_hook(keep(x.spec.name)) for x in BlockView(model).layers]
    for window in tokens:
        model(window[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize(("pruner", "score"), BOTH)
def test_gradients_are_the_dense_models_and_inputs_those_of_the_pruned_prefix(
    pruner, score, batch_size, make_model, tokens
):
    model, dense = make_model(), make_model()
    gradients = sample_gradients(dense, tokens)
    sparsify.prune(model, tokens, pruner=pruner, sparsity=0.5, batch_size=batch_size)
    prefix = make_model()  # its first block pruned, as the second one was met
    for layer, new in zip(BlockView(prefix).layers_of(0), BlockView(model).layers_of(0), strict=True):
        layer.write(new.weight)
    seen = entering(dense, tokens), entering(prefix, tokens)
    for old, new in zip(BlockView(dense).layers, BlockView(model).layers, strict=True):
        name = old.spec.name
        scores = score(old.weight, gradients[name], seen[old.spec.block][name])
        inputs = old.spec.in_features
        assert torch.equal(new.weight != 0, without_lowest(scores, inputs, inputs // 2)), name


def test_pruner_zero_is_the_same_in_every_regime(make_model, tokens):
    models = [make_model() for _ in range(3)]
    for model, regime in zip(models, ("propagated", "sequential", "dense"), strict=True):
        sparsify.prune(model, tokens, pruner="pruner_zero", method=("oneshot", {"regime": regime}), sparsity=0.5)
    first, *others = (torch.cat([x.weight.flatten() for x in BlockView(m).layers]) for m in models)
    assert all(torch.equal(first, other) for other in others)


def test_gradients_of_equal_size_leave_the_weights_to_rank(matrix):
    weight = matrix[0]
    for size in (0.0, 3.0):
        stats = LayerStats(1, {GRADIENT: torch.full((ROWS, INPUTS), size)})
        keep = PrunerZero().prune(weight, stats, Target(0.5)).keep
        assert torch.equal(keep, Magnitude("row").prune(weight, stats, Target(0.5)).keep)


def test_gblm_without_a_gradient_is_wanda(matrix):
    weight, gradients, windows = matrix
    stats = stats_of(gradients, windows)
    assert torch.equal(GBLM(alpha=0.0).score(weight, stats), Wanda().score(weight, stats))


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_a_weight_of_the_gradient_that_weighs_nothing_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha weighs"):
        GBLM(alpha=alpha)


@pytest.mark.parametrize("pruner", [PrunerZero(), GBLM()])
def test_a_gradient_that_is_not_a_number_names_the_layer(pruner, matrix):
    _, gradients, windows = matrix
    gradients[2][3, 4] = math.nan
    module = nn.Linear(INPUTS, ROWS)
    layer = Layer(LayerSpec("some.layer", 0, "layer", ROWS, INPUTS), module)
    with pytest.raises(NumericsError, match=r"some\.layer"):
        prune_layer(layer, stats_of(gradients, windows), pruner, Target(0.5))


@pytest.mark.parametrize("pruner", ["pruner_zero", "gblm"])
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named(pruner):
    model = MIXTURES["mixtral"].build()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[0] = 0
            block.mlp.gate.weight[1:] = block.mlp.gate.weight[1:].abs() * 50
    before = {layer.spec.name: layer.weight.clone() for layer in BlockView(model).layers}
    tokens = torch.randint(3, 90, (1, 2), generator=torch.Generator().manual_seed(1))
    rows = sparsify.prune(model, tokens, pruner=pruner, sparsity=0.5).layers
    unseen = [row.name for row in rows if "unseen" in row.notes]
    assert 0 < len(unseen) < len(rows)
    after = {layer.spec.name: layer.weight for layer in BlockView(model).layers}
    for name in unseen:
        assert ".experts." in name
        assert torch.equal(after[name], Magnitude().prune(before[name], LayerStats(0), Target(0.5)).weight)


def test_what_prunes_on_a_walk_of_its_own_refuses_gradients(make_model, tokens):
    with pytest.raises(UsageError, match="inputs, no gradients"):
        sparsify.prune(make_model(), tokens, pruner="gblm", allocator="neuronal", sparsity=0.5)
