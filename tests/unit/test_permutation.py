import itertools

import pytest
import torch

from sparsify.model.statistics import NORM, Accumulator
from sparsify.pruners.masks import keep_n_of_m
from sparsify.pruners.permutation import assigned, dealt
from sparsify.pruners.ria import RIA
from sparsify.types import Target


def retained(scores, order, kept, group):
    """Sum of the scores that N of M keeps in this order of the columns."""
    arranged = scores[:, order]
    return float((arranged * keep_n_of_m(arranged, kept, group)).sum())


def orders(inputs, group):
    """Every way to form groups of columns."""
    for order in itertools.permutations(range(inputs)):
        parts = [order[i : i + group] for i in range(0, inputs, group)]
        if all(list(part) == sorted(part) for part in parts) and parts == sorted(parts):
            yield torch.tensor(order)


def test_columns_are_dealt_back_and_forth():
    scores = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert dealt(scores, 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert dealt(scores, 2).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]


@pytest.mark.parametrize(("kept", "group"), [(1, 4), (2, 4), (3, 4), (2, 8)])
def test_the_refinement_is_a_permutation_that_keeps_no_less(kept, group):
    for _ in range(10):
        scores = torch.rand(6, 16) * torch.rand(16)
        start = dealt(scores, group)
        order = assigned(scores, start, kept, group)
        assert sorted(order.tolist()) == list(range(16))
        assert retained(scores, order, kept, group) >= retained(scores, start, kept, group) - 1e-5


def test_chunks_change_nothing(monkeypatch):
    scores = torch.rand(5, 24)
    whole = assigned(scores, torch.arange(24), 2, 4)
    monkeypatch.setattr("sparsify.pruners.permutation.CHUNK", 1)
    assert torch.equal(assigned(scores, torch.arange(24), 2, 4), whole)


def test_the_refinement_comes_near_the_best_of_all_groupings():
    found, best, start = 0.0, 0.0, 0.0
    for _ in range(10):
        scores = torch.rand(3, 8) * torch.rand(8)
        best += max(retained(scores, order, 2, 4) for order in orders(8, 4))
        start += retained(scores, dealt(scores, 4), 2, 4)
        found += retained(scores, assigned(scores, dealt(scores, 4), 2, 4), 2, 4)
    assert start <= found <= best + 1e-5
    assert best - found < 0.5 * (best - start)


@pytest.mark.parametrize("permute", ["deal", "assign"])
def test_ria_keeps_n_of_every_m_permuted_inputs(permute):
    weight, x = torch.randn(6, 16), torch.randn(1, 40, 16)
    accumulator = Accumulator(frozenset({NORM}))
    accumulator.fold(x, 1)
    stats, pruner = accumulator.finalise(1), RIA(permute=permute)
    pruned = pruner.prune(weight, stats, Target(0.75, 2, 8))
    scores = pruner.score(weight, stats)
    order = dealt(scores, 8) if permute == "deal" else assigned(scores, dealt(scores, 8), 2, 8)
    assert (pruned.keep[:, order].reshape(6, 2, 8).sum(dim=2) == 2).all()
    assert torch.equal(pruned.weight, weight * pruned.keep)
    plain = RIA().prune(weight, stats, Target(0.75, 2, 8))
    assert not torch.equal(pruned.keep, plain.keep)
    assert torch.equal(pruner.prune(weight, stats, Target(0.5)).keep, RIA().prune(weight, stats, Target(0.5)).keep)
