"""Statistics of one's own: named in `needs`, collected on the way, and no core file knows them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import sparsify
from sparsify.data.inputs import as_inputs
from sparsify.errors import UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.gradients import gradient_statistics
from sparsify.model.statistics import NORM, Statistic
from sparsify.model.walk import Walk
from sparsify.pruners.base import ScorePruner


@dataclass(frozen=True)
class Mean(Statistic):
    """Mean input over tokens."""

    def start(self, x) -> Any:
        return torch.zeros(x.shape[1], device=x.device)

    def fold(self, state, x, seen, total) -> None:
        state.mul_((seen / total).float()).add_(x.sum(0) / x.shape[0] * ((total - seen) / total).float())


@dataclass(frozen=True)
class Variance(Statistic):
    """Variance of the input over tokens."""

    def start(self, x) -> Any:
        return {name: torch.zeros(x.shape[1], device=x.device) for name in ("sum", "square")} | {"n": torch.zeros(1)}

    def fold(self, state, x, seen, total) -> None:
        state["sum"] += x.sum(0)
        state["square"] += x.square().sum(0)
        state["n"] += len(x)

    def finalise(self, state) -> Any:
        return state["square"] / state["n"] - (state["sum"] / state["n"]).square()


@dataclass(frozen=True)
class CrossGram(Statistic):
    """Sum over tokens of x_dense x^T."""

    reads: ClassVar[Any] = "pair"

    def start(self, x) -> Any:
        return torch.zeros(x.shape[1], x.shape[1], device=x.device)

    def fold(self, state, x, seen, total, dense=None) -> None:
        state += dense.T @ x


@dataclass(frozen=True)
class Fisher(Statistic):
    """Mean over samples of the squared gradient."""

    reads: ClassVar[Any] = "gradient"

    def start(self, x) -> Any:
        return torch.zeros_like(x)

    def fold(self, state, x, seen, total) -> None:
        state.mul_((seen / total).float()).add_(x.square() / total.float())


def inputs_of(model, tokens):
    """What enters each layer in the model's own forward, [tokens, inp]."""
    seen, view = {}, BlockView(model)

    def keep(name):
        return lambda _m, args: seen.update({name: args[0].detach().reshape(-1, args[0].shape[-1]).clone()})

    handles = [layer.module.register_forward_pre_hook(keep(layer.spec.name)) for layer in view.layers]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_walk_collects_whatever_is_needed(make_model, tokens, batch_size):
    model = make_model()
    walk, inputs = Walk(BlockView(model), tokens, batch_size), inputs_of(model, tokens)
    for block in range(2):
        for name, stats in walk.observe(block, frozenset({Mean(), Variance(), NORM}), advance=True).items():
            torch.testing.assert_close(stats[Mean()], inputs[name].mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats[Variance()], inputs[name].var(0, correction=0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(stats.square, inputs[name].square().sum(0) / 5)
            with pytest.raises(UsageError, match="CrossGram"):
                stats[CrossGram()]


@dataclass(frozen=True)
class Spy(ScorePruner):
    """Magnitude that keeps what it was given."""

    statistic: Any = None
    seen: Any = None

    @property
    def needs(self):
        return frozenset({self.statistic})

    def score(self, weight, stats):
        self.seen.append(stats[self.statistic])
        return weight.float().abs()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pair_is_the_input_and_the_dense_models_for_the_same_tokens(make_model, tokens, batch_size):
    dense, pruned, spy = make_model(), make_model(), Spy(statistic=CrossGram(), seen=[])
    rows = sparsify.prune(pruned, tokens, pruner=spy, sparsity=0.5, batch_size=batch_size).layers
    theirs = inputs_of(dense, tokens)
    names = [row.name for row in rows if row.block == 1]
    for layer in BlockView(pruned).layers_of(1):  # the block as it was when it was observed
        layer.write(dense.get_submodule(layer.spec.name).weight.data)
    ours = inputs_of(pruned, tokens)
    for name, cross in zip(names, spy.seen[-len(names) :], strict=True):
        torch.testing.assert_close(cross, theirs[name].T @ ours[name], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(theirs[names[0]], ours[names[0]])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pairs_within_a_block_are_of_the_dense_and_the_half_pruned_one(make_model, tokens, batch_size):
    dense, pruned, spy = make_model(), make_model(), Spy(statistic=CrossGram(), seen=[])
    method = ("oneshot", {"regime": "sequential"})
    rows = sparsify.prune(pruned, tokens, pruner=spy, method=method, sparsity=0.5, batch_size=batch_size).layers
    theirs, ours = (
        inputs_of(dense, tokens),
        inputs_of(pruned, tokens),
    )  # groups before it are pruned
    for row, cross in zip(rows, spy.seen, strict=True):
        torch.testing.assert_close(cross, theirs[row.name].T @ ours[row.name], rtol=1e-3, atol=1e-3)


def test_pairs_of_a_block_that_is_pruned_are_refused(make_model, tokens):
    view, needs = BlockView(make_model()), frozenset({CrossGram()})
    with pytest.raises(UsageError, match="without the dense model"):
        Walk(view, tokens).observe(0, needs)
    walk = Walk(view, tokens, needs=needs)
    walk.observe(0, needs)
    with pytest.raises(UsageError, match="a block that is pruned"):
        walk.observe(0, needs)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_gradients_are_those_of_single_samples_of_the_dense_model(make_model, tokens, batch_size):
    model, spy = make_model(), Spy(statistic=Fisher(), seen=[])
    view = BlockView(model)
    expected = {layer.spec.name: 0.0 for layer in view.layers}
    for window in tokens:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for layer in view.layers:
            expected[layer.spec.name] += layer.module.weight.grad.square() / len(tokens)
    model.zero_grad()
    rows = sparsify.prune(model, tokens, pruner=spy, sparsity=0.5, batch_size=batch_size).layers
    for row, squares in zip(rows, spy.seen, strict=True):
        torch.testing.assert_close(squares, expected[row.name], rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


@dataclass(frozen=True)
class FirstBlock:
    """A loss that depends on nothing behind the first block."""

    version: int = 1

    def prepare(self, model, inputs):
        return lambda model, batch: model(**batch, output_hidden_states=True).hidden_states[1].double().square().sum()

    def predictions(self, inputs):
        return len(inputs)


def test_a_layer_that_the_loss_does_not_depend_on_has_a_gradient_of_zero_and_is_not_seen(make_model, tokens):
    view = BlockView(make_model())
    stats = gradient_statistics(view, as_inputs(tokens), frozenset({Fisher()}), FirstBlock())
    for layer in view.layers:
        known = stats[layer.spec.name]
        assert known[Fisher()].shape == layer.weight.shape
        assert known.seen == bool(known[Fisher()].any()) == (layer.spec.block == 0)


def test_a_walk_refuses_gradients_and_does_not_take_inputs_for_them(make_model, tokens):
    with pytest.raises(UsageError, match=r"inputs, no gradients.*Fisher"):
        Walk(BlockView(make_model()), tokens).observe(0, frozenset({NORM, Fisher()}))
