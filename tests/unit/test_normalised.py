"""What the pruners that solve a layer's least-squares problem have in common."""

import math
from dataclasses import replace

import pytest
import torch
from problems import draw, stats_of

from sparsify.errors import NumericsError, UsageError
from sparsify.pruners.admm import ADMM
from sparsify.pruners.alps import ALPS
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.normalised import normalised
from sparsify.pruners.sparsegpt import SparseGPT
from sparsify.types import Target

TARGETS = [Target(0.5), Target(0.75), Target(0.5, 2, 4)]
SOLVERS = [ALPS(), ALPS("row"), ADMM(), ADMM("matrix")]


def error(weight, pruned, x):
    return float(((weight - pruned.weight) @ x.T).norm() / (weight @ x.T).norm())


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
@pytest.mark.parametrize("target", [Target(0.0), Target(0.0, 4, 4)])
def test_with_all_weights_nothing_changes(pruner, target):
    weight, x = draw(6, 16, 40)
    pruned = pruner.prune(weight, stats_of(x), target)
    assert pruned.keep.all()
    torch.testing.assert_close(pruned.weight, weight, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("pruner", "better"), [(ALPS(), 20), (ADMM(), 17)], ids=str)
@pytest.mark.parametrize("shape", [(6, 16, 40), (12, 16, 60), (24, 32, 200)])
def test_the_error_is_below_magnitudes_always_and_below_sparsegpts_mostly(pruner, better, target, shape):
    """No worse than SparseGPT: ALPS in all of 20 draws, ADMM in 17 (2:4, 12 x 16), 19 (half, 6 x 16) or all."""
    wins = 0
    for seed in range(20):
        weight, x = draw(*shape, seed)
        stats = stats_of(x)
        ours, magnitude, sparsegpt = (p.prune(weight, stats, target) for p in (pruner, Magnitude(), SparseGPT()))
        assert int(ours.keep.sum()) == int(magnitude.keep.sum()) == int(sparsegpt.keep.sum())
        assert error(weight, ours, x) < error(weight, magnitude, x)
        wins += error(weight, ours, x) <= error(weight, sparsegpt, x)
    assert wins >= better


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (5, 8), (3, 16)])
def test_n_of_m_is_exact_in_every_group(pruner, kept, group):
    weight, x = draw(6, 16, 40)
    pruned = pruner.prune(weight, stats_of(x), Target(1 - kept / group, kept, group))
    assert ((pruned.weight != 0).reshape(-1, group).sum(dim=1) == kept).all()
    assert torch.equal(pruned.weight != 0, pruned.keep)


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
def test_zeros_are_counted_over_the_group(pruner, sparsity):
    weight, x = draw(7, 15, 40)
    zeros = (pruner.prune(weight * torch.arange(1.0, 8)[:, None], stats_of(x), Target(sparsity)).weight == 0).sum(dim=1)
    if pruner.group == "row":
        assert (zeros == math.floor(sparsity * 15 + 1e-6)).all()
    else:
        assert int(zeros.sum()) == math.floor(sparsity * 105 + 1e-6)
        assert zeros.min() < zeros.max()


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
def test_inputs_that_never_occurred_go_first(pruner):
    weight, x = draw(6, 16, 40)
    x[:, [0, 5, 11, 15]] = 0
    pruned = pruner.prune(weight, stats_of(x), Target(0.5))
    assert not pruned.weight[:, [0, 5, 11, 15]].any()
    assert int((pruned.weight == 0).sum()) == 48


@pytest.mark.parametrize("pruner", [ALPS(), ALPS("row"), ADMM(gradual=False)], ids=str)  # a ramp would be another one
def test_the_other_inputs_are_pruned_as_without_them(pruner):
    weight, x = draw(6, 16, 40)
    alive = [j for j in range(16) if j not in (0, 5, 11, 15)]
    x[:, [0, 5, 11, 15]] = 0
    as_much = replace(pruner, damp=pruner.damp * 16 / 12)  # it is a fraction of the mean over all inputs
    pruned = as_much.prune(weight, stats_of(x), Target(0.5))
    without = pruner.prune(weight[:, alive], stats_of(x[:, alive]), Target(4 / 12))
    assert torch.equal(pruned.keep[:, alive], without.keep)
    torch.testing.assert_close(pruned.weight[:, alive], without.weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
def test_what_is_kept_of_inputs_that_never_occurred_is_as_it_was(pruner):
    weight, x = draw(6, 16, 40)
    x[:, :8] = 0
    pruned = pruner.prune(weight, stats_of(x), Target(0.25))
    assert int((~pruned.keep).sum()) == int((pruned.weight == 0).sum()) == 24
    assert pruned.keep[:, 8:].all()
    torch.testing.assert_close(pruned.weight, weight * pruned.keep, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
@pytest.mark.parametrize("x", [torch.ones(40, 16), torch.zeros(40, 16)], ids=["rank one", "no input"])
def test_a_singular_gram_gives_finite_weights(pruner, x):
    weight = torch.randn(6, 16)
    pruned = pruner.prune(weight, stats_of(x), Target(0.5))
    assert torch.isfinite(pruned.weight).all()
    assert int((~pruned.keep).sum()) == 48


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gram_that_is_not_finite_is_refused(pruner, value):
    weight, x = draw(6, 16, 40)
    stats = stats_of(x)
    stats.gram[2, 3] = stats.gram[3, 2] = value
    with pytest.raises(NumericsError, match="not finite"):
        pruner.prune(weight, stats, Target(0.5))


@pytest.mark.parametrize(("pruner", "tried"), [(ALPS(), "damp=0.01: -"), (ADMM(), "damp=0.1 and rho=1")], ids=str)
def test_an_indefinite_gram_is_refused_with_what_was_tried(pruner, tried):
    stats = stats_of(torch.randn(40, 16))
    stats.gram.copy_(torch.eye(16) - 5 * torch.ones(16, 16).fill_diagonal_(0))
    with pytest.raises(NumericsError, match=tried):
        pruner.prune(torch.randn(6, 16), stats, Target(0.5))


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_weight_that_is_not_a_number_is_refused(pruner, target):
    weight, x = draw(6, 16, 40)
    weight[1, 2] = math.nan
    with pytest.raises(NumericsError, match="NaN"):
        pruner.prune(weight, stats_of(x), target)


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
def test_arguments_stay_as_they_are_and_the_result_is_single_precision(pruner):
    weight, x = draw(6, 16, 40)
    weight, stats = weight.bfloat16(), stats_of(x)
    before = weight.clone(), stats.gram.clone()
    pruned = pruner.prune(weight, stats, Target(0.5))
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.gram, before[1])
    assert pruned.weight.dtype == torch.float32


@pytest.mark.parametrize("pruner", SOLVERS, ids=str)
def test_the_unit_of_the_inputs_does_not_matter(pruner):
    weight, x = draw(6, 16, 40)
    one, other = (pruner.prune(weight, stats_of(scale * x), Target(0.5)) for scale in (1, 1024))
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ALPS, {name: value}) for name, value in [("damp", 0.0), ("rho", 0.0), ("iterations", 0), ("refine", -1)]]
    + [(ADMM, {name: value}) for name, value in [("damp", -0.1), ("rho", math.inf), ("ramp", 0), ("ramp", 21)]],
)
def test_bad_hyper_parameters_are_refused(kind, options):
    with pytest.raises(UsageError):
        kind(**options)


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_normalised_inputs_have_norm_one_and_give_the_same_output(damp):
    weight, x = draw(6, 16, 40)
    gram = x.T @ x
    problem = normalised(gram, damp)
    torch.testing.assert_close(problem.gram.diagonal(), torch.ones(16))
    one, hessian = problem.scaled(weight), gram + damp * gram.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(one @ problem.gram @ one.T, weight @ hessian @ weight.T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(problem.restored(one, weight, weight > 0), weight.clamp_min(0))
