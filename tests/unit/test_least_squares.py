import pytest
import torch
from problems import draw

from sparsify.errors import NumericsError, UsageError
from sparsify.model.statistics import Accumulator
from sparsify.pruners.alps import ALPS
from sparsify.pruners.least_squares import CROSS, LeastSquares
from sparsify.types import Target


def pair(x, dense, needs):
    """Statistics of inputs, and of those of the dense model beside them, as one sample."""
    sums = Accumulator(needs)
    sums.fold(x, 1, dense)
    return sums.finalise(1)


def solved(weight, x, dense, share, damp, keep):
    """Row by row, min ||X v - Y w||^2 + lambda ||v - w||^2 over the kept inputs, Y = a X~ + (1 - a) X, in doubles."""
    weight, x, dense = weight.double(), x.double(), dense.double()
    lam = damp * x.square().sum(dim=0).mean()
    eye = lam.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    system, wanted = torch.cat([x, eye]), torch.cat([share * dense + (1 - share) * x, eye]) @ weight.T
    new = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        new[row, kept] = torch.linalg.lstsq(system[:, kept], wanted[:, row]).solution
    return new


@pytest.fixture
def problem():
    weight, x = draw(6, 16, 60)
    return weight, x, x + 0.3 * torch.randn_like(x)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("target", [Target(0.25), Target(0.5), Target(0.8), Target(0.5, 2, 4)], ids=str)
def test_weights_on_the_mask_are_those_of_least_squares(problem, share, target):
    weight, x, dense = problem
    pruner = LeastSquares(share, refine=100)
    pruned = pruner.prune(weight, pair(x, dense, pruner.needs), target)
    wanted = solved(weight, x, dense, share, 0.01, pruned.keep)
    torch.testing.assert_close(pruned.weight.double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_goes_is_what_costs_least_to_remove_from_the_solution_without_a_mask(problem, share):
    weight, x, dense = problem
    pruner = LeastSquares(share, refine=0)
    stats = pair(x, dense, pruner.needs)
    pruned = pruner.prune(weight, stats, Target(0.5))
    whole = solved(weight, x, dense, share, 0.01, torch.ones_like(weight, dtype=torch.bool))
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(16)
    costs = whole.square() / hessian.inverse().diagonal()
    assert torch.equal(pruned.keep, costs > costs.flatten().kthvalue(48).values)
    torch.testing.assert_close(pruned.weight.double(), whole * pruned.keep, rtol=1e-4, atol=1e-4)


def test_the_cross_gram_is_of_dense_with_pruned_inputs_over_all_batches(problem):
    _, x, dense = problem
    sums = Accumulator(frozenset({CROSS}))
    sums.fold(x[:20], 1, dense[:20])
    sums.fold(x[20:], 2, dense[20:])
    torch.testing.assert_close(sums.finalise(3)[CROSS], 2 / 3 * dense.T @ x)


def test_outputs_of_the_dense_model_are_nearer_with_a_share_of_them(problem):
    weight, x, _ = problem
    dense, errors = (
        x @ (torch.eye(16) + 0.3 * torch.randn(16, 16)),
        [],
    )  # what went wrong before, a layer can make up for
    for share in (0.0, 1.0):
        pruner = LeastSquares(share)
        new = pruner.prune(weight, pair(x, dense, pruner.needs), Target(0.5)).weight
        errors.append(float((x @ new.T - dense @ weight.T).norm()))
    assert errors[1] < errors[0]


def test_inputs_that_never_occurred_lose_their_weights_first_and_count_as_targets(problem):
    weight, x, dense = problem
    x[:, :4] = 0
    pruner = LeastSquares(1.0, refine=100)
    pruned = pruner.prune(weight, pair(x, dense, pruner.needs), Target(0.5))
    assert not pruned.keep[:, :4].any()
    wanted = solved(weight, x, dense, 1.0, 0.01, pruned.keep)
    torch.testing.assert_close(pruned.weight.double()[:, 4:], wanted[:, 4:], rtol=5e-3, atol=5e-3)


def test_without_a_share_the_dense_model_is_not_carried_along():
    assert CROSS in LeastSquares().needs
    assert LeastSquares(0.0).needs == ALPS.needs


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": -0.1}, {"damp": 0.0}, {"refine": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        LeastSquares(**wrong)


def test_a_gram_matrix_that_is_not_finite_is_refused(problem):
    weight, x, dense = problem
    x[0, 0] = torch.inf
    pruner = LeastSquares(0.0)
    with pytest.raises(NumericsError):
        pruner.prune(weight, pair(x, dense, pruner.needs), Target(0.5))
