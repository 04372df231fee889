"""DSnoT: swaps by plain loops, row by row, and what they keep."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import sparsify
from sparsify.errors import UsageError
from sparsify.model.statistics import GRAM, Accumulator
from sparsify.pruners.dsnot import SUM, VARIANCE, DSnoT
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.ria import RIA
from sparsify.pruners.sparsegpt import SparseGPT
from sparsify.pruners.wanda import Wanda
from sparsify.types import Target

ROWS, INPUTS = 6, 24
FIRST = [Wanda(), Magnitude(), SparseGPT()]
TARGETS = [Target(0.3), Target(0.6), Target(0.5, 2, 4), Target(0.25, 6, 8)]


@pytest.fixture
def weight():
    return torch.randn(ROWS, INPUTS)


@pytest.fixture
def x():
    """Windows of inputs with unequal means and sizes, [windows, tokens, inputs]."""
    return (torch.randn(3, 20, INPUTS) + torch.randn(INPUTS)) * torch.rand(INPUTS)


def stats_of(x):
    accumulator = Accumulator(DSnoT(SparseGPT()).needs)
    accumulator.fold(x, len(x))
    return accumulator.finalise(len(x))


def mean_error(weight, pruned, x):
    """What is missing of every output's mean, summed over a window's tokens."""
    return ((weight - pruned.weight).double() @ x.double().sum(1).mean(0)).abs()


def swapped_row(dense, sparse, keep, x, pruner, group):
    """One row of the mask, every candidate looked at before every swap."""
    tokens = x.double().reshape(-1, INPUTS)
    sums, variances = (x.double().sum(1).mean(0)).tolist(), tokens.var(0, correction=0).tolist()
    norms = (tokens.square().sum(0) / len(x)).sqrt().tolist()
    first, keep, swapped = list(keep), list(keep), set()
    error = sum((d - s) * m for d, s, m in zip(dense, sparse, sums, strict=True))
    for _ in range(pruner.cycles):
        sign = 1 if error > 0 else -1
        free = [j for j in range(INPUTS) if j not in swapped]
        may_go = [j for j in free if first[j] and sign * sparse[j] * sums[j] < 0]
        may_grow = [
            i
            for i in free
            if not first[i] and sign * dense[i] * sums[i] > 0 and any(i // group == j // group for j in may_go)
        ]
        if abs(error) <= pruner.threshold or not may_grow:
            break
        grown = max(may_grow, key=lambda i: sign * dense[i] * sums[i] / variances[i] ** pruner.power)
        others = [j for j in may_go if j // group == grown // group]
        gone = min(others, key=lambda j: abs(sparse[j]) * norms[j])
        after = error - dense[grown] * sums[grown] + sparse[gone] * sums[gone]
        if pruner.same_sign and after * error <= 0:
            break
        error, keep[grown], keep[gone] = after, True, False
        swapped |= {grown, gone}
    return keep


@pytest.mark.parametrize("first", FIRST, ids=repr)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize(
    "options",
    [{}, {"same_sign": False}, {"power": 0.0, "cycles": 3}, {"threshold": 3.0, "power": 2.0}],
    ids=repr,
)
def test_swaps_are_those_of_plain_loops(first, target, options, weight, x):
    pruner, stats = DSnoT(first, **options), stats_of(x)
    before, pruned = first.prune(weight, stats, target), pruner.prune(weight, stats, target)
    rows = zip(weight.double().tolist(), before.weight.double().tolist(), before.keep.tolist(), strict=True)
    expected = torch.tensor([swapped_row(*row, x, pruner, target.group or INPUTS) for row in rows])
    assert torch.equal(pruned.keep, expected)


@pytest.mark.parametrize(("first", "target"), [*itertools.product(FIRST, TARGETS)], ids=repr)
def test_a_row_keeps_as_many_weights_and_a_group_n_of_m(first, target, weight, x):
    stats = stats_of(x)
    before, keep = first.prune(weight, stats, target).keep, DSnoT(first).prune(weight, stats, target).keep
    group = target.group or INPUTS
    assert torch.equal(keep.unflatten(1, (-1, group)).sum(2), before.unflatten(1, (-1, group)).sum(2))


@pytest.mark.parametrize("first", FIRST, ids=repr)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_no_row_is_further_from_its_mean_output(first, target, weight, x):
    stats = stats_of(x)
    before = mean_error(weight, first.prune(weight, stats, target), x)
    after = mean_error(weight, DSnoT(first).prune(weight, stats, target), x)
    assert (after <= before + 1e-5).all()


def test_wide_rows_come_much_nearer():
    weight, x = torch.randn(20, 400), torch.randn(3, 20, 400) + torch.randn(400)
    stats = stats_of(x)
    before, after = (mean_error(weight, p.prune(weight, stats, Target(0.5)), x) for p in (Wanda(), DSnoT()))
    assert after.median() < before.median() / 3


def test_what_sparsegpt_kept_stays_as_it_made_it_and_what_comes_back_is_dense(weight, x):
    stats = stats_of(x)
    before, pruned = (p.prune(weight, stats, Target(0.5)) for p in (SparseGPT(), DSnoT(SparseGPT(), same_sign=False)))
    stayed, back = pruned.keep & before.keep, pruned.keep & ~before.keep
    assert back.any()
    assert torch.equal(pruned.weight[stayed], before.weight[stayed])
    assert torch.equal(pruned.weight[back], weight[back])
    assert int((pruned.weight == 0).sum()) == ROWS * INPUTS // 2


def test_an_input_without_mean_or_variance_is_no_obstacle(weight, x):
    x[..., 3], x[..., 5] = 0.0, 1.0
    pruned = DSnoT().prune(weight, stats_of(x), Target(0.5))
    assert not pruned.keep[:, 3].any()
    assert (pruned.keep.sum(1) == INPUTS // 2).all()


@pytest.mark.parametrize("options", [{"cycles": 0}, {"threshold": 1e9}])
def test_without_swaps_it_is_the_first_pruner(options, weight, x):
    stats = stats_of(x)
    before, pruned = (p.prune(weight, stats, Target(0.5)) for p in (Wanda(), DSnoT(**options)))
    assert torch.equal(pruned.weight, before.weight)


def test_half_precision_weights_come_back_as_they_were(weight, x):
    half, stats = weight.half(), stats_of(x)
    pruned = DSnoT().prune(half, stats, Target(0.5))
    assert pruned.weight.dtype == torch.float16
    assert torch.equal(pruned.weight, torch.where(pruned.keep, half, 0.0))
    assert torch.equal(pruned.keep, DSnoT().prune(half.float(), stats, Target(0.5)).keep)


@pytest.mark.parametrize("batches", [[3], [1, 1, 1], [2, 1]])
def test_its_statistics_do_not_depend_on_how_windows_are_batched(batches, x):
    x = x + 100  # sums of squares would lose the variance
    accumulator = Accumulator(frozenset({SUM, VARIANCE}))
    for part in x.split(batches):
        accumulator.fold(part, len(part))
    accumulator.fold(x[:0], 0)
    stats, tokens = accumulator.finalise(3), x.double().reshape(-1, INPUTS)
    torch.testing.assert_close(stats[SUM].double(), tokens.sum(0) / 3, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats[VARIANCE].double(), tokens.var(0, correction=0), rtol=1e-3, atol=1e-5)


def test_it_needs_what_the_first_pruner_needs():
    assert DSnoT(SparseGPT()).needs == DSnoT(Magnitude()).needs | {GRAM}


def test_a_model_is_pruned_by_it_around_another(make_model, tokens):
    pruner = DSnoT(DSnoT(SparseGPT()), cycles=5)
    assert sparsify.prune(make_model(), tokens, pruner=pruner, sparsity=0.5).sparsity == 0.5
    assert sparsify.prune(make_model(), tokens, pruner="dsnot", pattern="2:4").sparsity == 0.5


def test_groups_of_permuted_inputs_are_refused(weight, x):
    pruner, stats = DSnoT(RIA(permute="deal")), stats_of(x)
    assert pruner.prune(weight, stats, Target(0.5)).keep.sum() == ROWS * INPUTS // 2
    with pytest.raises(UsageError, match=r"pruner\.first\.permute=none"):
        pruner.prune(weight, stats, Target(0.5, 2, 4))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"first": "wanda"}, "pruner@pruner.first=<name>"),
        ({"cycles": -1}, "cycles >= 0"),
        ({"threshold": -0.1}, "threshold >= 0"),
        ({"threshold": math.nan}, "threshold >= 0"),
        ({"power": -1.0}, "power <= 10"),
    ],
)
def test_what_is_out_of_range_is_refused(options, what):
    with pytest.raises(UsageError, match=what):
        DSnoT.__post_init__(SimpleNamespace(**{**vars(DSnoT()), **options}))  # the tests check types before it does
