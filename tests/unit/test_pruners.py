import math

import pytest
import torch

from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import GRAM, NORM, Accumulator
from sparsify.pruners import sparsegpt
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.ria import RIA
from sparsify.pruners.sparsegpt import SparseGPT, inverse_factor
from sparsify.pruners.wanda import Wanda
from sparsify.types import Target

ROWS, INPUTS, TOKENS = 6, 16, 40


def stats_of(x):
    """Statistics of one window of tokens, [tokens, inputs]."""
    accumulator = Accumulator(frozenset({NORM, GRAM}))
    accumulator.fold(x[None], 1)
    return accumulator.finalise(1)


@pytest.fixture
def weight():
    return torch.randn(ROWS, INPUTS)


@pytest.fixture
def x():
    """Correlated inputs of unequal sizes."""
    return torch.randn(TOKENS, INPUTS) @ torch.randn(INPUTS, INPUTS) * torch.rand(INPUTS)


def without_lowest(scores, count):
    """Mask without the `count` lowest of a dict position -> score."""
    return {place: place not in sorted(scores, key=scores.get)[:count] for place in scores}


def naive_mask(scores, groups, count):
    """Mask [rows, inputs] that drops the `count` lowest of every group of positions."""
    mask = torch.ones(ROWS, INPUTS, dtype=torch.bool)
    for group in groups:
        for (i, j), kept in without_lowest({(i, j): scores[i][j] for i, j in group}, count).items():
            mask[i, j] = kept
    return mask


def everywhere():
    return [[(i, j) for i in range(ROWS) for j in range(INPUTS)]]


def by_row(width=INPUTS):
    return [[(i, j) for j in range(start, start + width)] for i in range(ROWS) for start in range(0, INPUTS, width)]


def sizes(weight):
    return [[abs(w) for w in row] for row in weight.double().tolist()]


def norms(x):
    return [math.sqrt(sum(v * v for v in column)) for column in x.double().T.tolist()]


def wanda(weight, x):
    return [[w * n for w, n in zip(row, norms(x), strict=True)] for row in sizes(weight)]


def ria(weight, x):
    size = sizes(weight)
    columns = [sum(row[j] for row in size) for j in range(INPUTS)]
    return [[(w / columns[j] + w / sum(row)) * norms(x)[j] ** 0.5 for j, w in enumerate(row)] for row in size]


def magnitude(weight, x):
    return sizes(weight)


@pytest.mark.parametrize(
    ("pruner", "score", "groups"),
    [
        (Magnitude(), magnitude, everywhere()),
        (Magnitude("row"), magnitude, by_row()),
        (Wanda(), wanda, by_row()),
        (Wanda("matrix"), wanda, everywhere()),
        (RIA(), ria, everywhere()),
        (RIA("row"), ria, by_row()),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_scores_and_groups_are_those_of_the_papers(pruner, score, groups, sparsity, weight, x):
    pruned = pruner.prune(weight, stats_of(x), Target(sparsity))
    count = math.floor(sparsity * len(groups[0]) + 1e-6)
    assert torch.equal(pruned.keep, naive_mask(score(weight, x), groups, count))
    assert torch.equal(pruned.weight, torch.where(pruned.keep, weight, torch.zeros(())))


@pytest.mark.parametrize(("pruner", "score"), [(Magnitude(), magnitude), (Wanda(), wanda), (RIA(), ria)])
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (2, 8)])
def test_n_of_m_ranks_within_groups_of_m_inputs(pruner, score, kept, group, weight, x):
    pruned = pruner.prune(weight, stats_of(x), Target(1 - kept / group, kept, group))
    assert torch.equal(pruned.keep, naive_mask(score(weight, x), by_row(group), group - kept))


def test_a_pruner_does_not_touch_its_arguments(weight, x):
    stats = stats_of(x)
    before = weight.clone(), stats.gram.clone(), stats.square.clone()
    for pruner in (Magnitude(), Wanda(), RIA(), SparseGPT()):
        pruner.prune(weight, stats, Target(0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, stats.gram, stats.square), strict=True))


def test_ria_survives_an_empty_row_and_column(weight, x):
    weight[1], weight[:, 2] = 0, 0
    pruned = RIA().prune(weight, stats_of(x), Target(0.5))
    assert int((~pruned.keep).sum()) == ROWS * INPUTS // 2
    assert not pruned.keep[1].any()


def damped(x, damp):
    """H of the paper in float64, with unused inputs given a unit diagonal."""
    hessian = 2 * x.double().T @ x.double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64), dead


def naive_obs(weight, x, columns, count=0, kept=None, group=None, damp=0.01):
    """Column by column, the exact OBS step on the inverse over the columns that are left (no Cholesky factor).

    The mask of a slab is chosen when its first column is reached: the lowest w_j^2 / [H_{>=j}^-1]_jj.
    """
    hessian, dead = damped(x, damp)
    w = weight.double().clone()
    w[:, dead] = 0
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(INPUTS)]
    pivots = torch.stack([inv[0, 0] for inv in inverse])
    keep = torch.ones_like(w, dtype=torch.bool)
    width = group or columns
    for j in range(INPUTS):
        if j % width == 0:
            saliency = w[:, j : j + width].square() / pivots[j : j + width]
            ranked = saliency if group else saliency.reshape(1, -1)
            lowest = ranked.argsort(dim=1)[:, : group - kept if group else count]
            kept_here = torch.ones_like(ranked, dtype=torch.bool).scatter(1, lowest, False)
            keep[:, j : j + width] = kept_here.view_as(saliency)
        removed = torch.where(keep[:, j], 0.0, w[:, j])
        w[:, j:] -= torch.outer(removed / pivots[j], inverse[j][0])
        w[~keep[:, j], j] = 0
    return w, keep


@pytest.mark.parametrize("columns", [16, 8, 4])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_sparsegpt_is_optimal_brain_surgeon(sparsity, columns, weight, x):
    pruned = SparseGPT(columns=columns).prune(weight, stats_of(x), Target(sparsity))
    expected, keep = naive_obs(weight, x, columns, count=int(sparsity * ROWS * columns))
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [128, 8, 6])
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8)])
def test_sparsegpt_chooses_n_of_m_from_the_updated_weights(kept, group, columns, weight, x):
    pruned = SparseGPT(columns=columns).prune(weight, stats_of(x), Target(1 - kept / group, kept, group))
    expected, keep = naive_obs(weight, x, columns, kept=kept, group=group)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_update_makes_up_for_what_the_mask_removes(weight, x):
    pruned = SparseGPT().prune(weight, stats_of(x), Target(0.5))
    updated, masked = (((weight - new) @ x.T).norm() for new in (pruned.weight, weight * pruned.keep))
    assert updated < masked


def test_sparsegpt_empties_dead_columns_first(weight, x):
    x[:, [1, 5, 6]] = 0
    pruned = SparseGPT().prune(weight, stats_of(x), Target(0.5))
    expected, keep = naive_obs(weight, x, 128, count=ROWS * INPUTS // 2)
    assert not pruned.weight[:, [1, 5, 6]].any()
    assert int((pruned.weight == 0).sum()) == ROWS * INPUTS // 2
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_zeros_count_is_exact_over_slabs_that_do_not_divide(x):
    pruned = SparseGPT(columns=5).prune(torch.randn(7, INPUTS), stats_of(x), Target(0.33))
    assert int((~pruned.keep).sum()) == math.floor(0.33 * 7 * INPUTS)


def test_damping_is_raised_until_a_singular_gram_factorises(weight):
    stats = stats_of(torch.ones(TOKENS, INPUTS))  # rank one
    pruned = SparseGPT(damp=1e-10).prune(weight, stats, Target(0.5))
    assert 1e-10 < pruned.notes["damp"] <= 1
    assert torch.isfinite(pruned.weight).all()


def test_ordinary_damping_is_not_a_remark(weight, x):
    assert SparseGPT().prune(weight, stats_of(x), Target(0.5)).notes == {}


def test_no_damping_helps_an_indefinite_gram():
    with pytest.raises(NumericsError, match="damping up to 1"):
        inverse_factor(torch.eye(4) - 5 * torch.ones(4, 4).fill_diagonal_(0), 0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gram_that_is_not_finite_is_refused(value, weight, x):
    stats = stats_of(x)
    stats.gram[2, 3] = stats.gram[3, 2] = value
    with pytest.raises(NumericsError, match="not finite"):
        SparseGPT().prune(weight, stats, Target(0.5))


def test_layers_that_share_an_input_share_its_factorisation(weight, x, monkeypatch):
    calls = []
    monkeypatch.setattr(sparsegpt, "inverse_factor", lambda *a: calls.append(1) or inverse_factor(*a))
    stats = stats_of(x)
    for sparsity in (0.5, 0.7):
        SparseGPT().prune(weight, stats, Target(sparsity))
    assert len(calls) == 1
    SparseGPT(damp=0.1).prune(weight, stats, Target(0.5))
    SparseGPT().prune(weight, stats_of(x), Target(0.5))
    assert len(calls) == 3


@pytest.mark.parametrize("pruner", [Wanda(), RIA(), SparseGPT()])
def test_missing_statistics_are_a_programming_error(pruner, weight):
    empty = Accumulator(frozenset()).finalise(1)
    with pytest.raises(UsageError, match="needs"):
        pruner.prune(weight, empty, Target(0.5))


@pytest.mark.parametrize(
    ("pruner", "options"), [(SparseGPT, {"damp": 0.0}), (SparseGPT, {"damp": -1.0}), (SparseGPT, {"columns": 0})]
)
def test_bad_hyper_parameters_are_refused(pruner, options):
    with pytest.raises(UsageError):
        pruner(**options)


def test_pruning_never_runs_in_tf32_and_puts_the_setting_back():
    from sparsify.model.statistics import full_precision

    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def released_sparsegpt(weight, gram, sparsity, columns):
    """The release's procedure, re-derived step by step: its threshold, its column loop, its order of operations."""
    work, gram = weight.clone(), gram.clone()
    gram += torch.diag(torch.full((len(gram),), float(0.01 * gram.diagonal().mean())))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    for start in range(0, work.shape[1], columns):
        end = min(start + columns, work.shape[1])
        part, inverse = work[:, start:end].clone(), upper[start:end, start:end]
        scores = part**2 / inverse.diagonal().reshape(1, -1) ** 2
        gone = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        kept, errors = torch.zeros_like(part), torch.zeros_like(part)
        for i in range(end - start):
            kept[:, i] = part[:, i].masked_fill(gone[:, i], 0.0)
            errors[:, i] = (part[:, i] - kept[:, i]) / inverse[i, i]
            part[:, i:] -= errors[:, i : i + 1] @ inverse[i : i + 1, i:]
        work[:, start:end] = kept
        work[:, end:] -= errors @ upper[start:end, end:]
    return work


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_released_rule_zeroes_what_the_release_zeroes(sparsity):
    weight, stats = torch.randn(24, 40), stats_of(torch.randn(200, 40))
    ours = SparseGPT(columns=16, rule="released").prune(weight, stats, Target(sparsity)).weight
    theirs = released_sparsegpt(weight, stats.gram, sparsity, 16)
    assert torch.equal(ours == 0, theirs == 0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert int((ours == 0).sum()) == sum(int(24 * width * sparsity) + 1 for width in (16, 16, 8))
