import pytest
import torch
from problems import draw, stats_of

from sparsify.pruners import admm
from sparsify.pruners.admm import ADMM, inverted, partial_mask
from sparsify.pruners.masks import num_zeros
from sparsify.types import Target


def naive(weight, x, pruner, target):
    """The released procedure in loops: lists of numbers, a linear system solved for every row."""
    rows, inputs = weight.shape
    gram = 2 * x.double().T @ x.double()
    norms = gram.diagonal().sqrt()
    gram = gram / norms / norms[:, None]
    gram += pruner.damp * torch.eye(inputs)
    dense = weight.double() * norms
    work, dual, keep = dense.clone(), torch.zeros_like(dense), None
    for step in range(1, pruner.iterations + 1):
        if step <= pruner.ramp:
            share = 1 - (1 - step / pruner.ramp) ** 3 if pruner.gradual else 1.0
            keep = naive_mask((work + dual).abs().tolist(), share, pruner.group, target)
        sparse = torch.zeros_like(dense)
        for i in range(rows):
            for j in range(inputs):
                sparse[i, j] = float(work[i, j] + dual[i, j]) if keep[i][j] else 0.0
                dual[i, j] += float(work[i, j] - sparse[i, j])
            right = gram @ dense[i] + pruner.rho * (sparse[i] - dual[i])
            work[i] = torch.linalg.solve(gram + pruner.rho * torch.eye(inputs), right)
    keep = torch.tensor(keep)
    return (work + dual) * keep / norms, keep


def naive_mask(scores, share, group, target):
    rows, inputs = len(scores), len(scores[0])
    keep = [[True] * inputs for _ in range(rows)]
    safe, sparsity = set(), target.sparsity
    if target.group:
        sparsity = 1 - target.kept / target.group
        for i in range(rows):
            for start in range(0, inputs, target.group):
                best = sorted(range(start, start + target.group), key=lambda j: -scores[i][j])[: target.kept]
                safe |= {(i, j) for j in best}
    rivals = [[(i, j) for j in range(inputs)] for i in range(rows)]
    if group == "matrix":
        rivals = [[place for places in rivals for place in places]]
    for places in rivals:
        loose = sorted((p for p in places if p not in safe), key=lambda p: scores[p[0]][p[1]])
        for i, j in loose[: num_zeros(len(places), share * sparsity)]:
            keep[i][j] = False
    return keep


TARGETS = [Target(0.25), Target(0.5), Target(0.75), Target(0.5, 2, 4), Target(0.75, 1, 4)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("gradual", [True, False])
@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("shape", [(3, 4, 9), (6, 16, 40)])
def test_the_updates_are_those_of_the_release(target, gradual, group, shape):
    weight, x = draw(*shape)
    pruner = ADMM(group, gradual)
    pruned = pruner.prune(weight, stats_of(x), target)
    expected, keep = naive(weight, x, pruner, target)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-3)


OTHERS = [{"ramp": 1, "iterations": 3}, {"ramp": 4, "iterations": 4}, {"rho": 0.5, "damp": 0.01}]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_its_numbers_are_parameters(options):
    weight, x = draw(3, 4, 9)
    pruner = ADMM(**options)
    expected, keep = naive(weight, x, pruner, Target(0.5))
    pruned = pruner.prune(weight, stats_of(x), Target(0.5))
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_mask_grows_with_the_cube_and_then_stays():
    masks = [ADMM("matrix")._mask(step, torch.randn(10, 100), Target(0.6)) for step in range(1, 21)]
    zeros = [int((~mask).sum()) for mask in masks[:15]]
    assert zeros == [num_zeros(1000, 0.6 * (1 - (1 - step / 15) ** 3)) for step in range(1, 16)]
    assert (zeros[0], zeros[-1]) == (112, 600)
    assert masks[15:] == [None] * 5


def test_the_largest_n_of_a_group_are_safe_at_every_share():
    scores = torch.rand(8, 32)
    target = Target(0.5, 2, 4)
    full = partial_mask(scores, target, 1.0, "matrix")
    for share in (0.0, 0.2, 0.9):
        part = partial_mask(scores, target, share, "matrix")
        assert (part | ~full).all()
        assert int((~part).sum()) == num_zeros(256, share / 2)


def test_more_steps_with_a_fixed_mask_come_nearer_to_least_squares():
    weight, x = draw(6, 16, 40)
    pruned = [ADMM(iterations=n).prune(weight, stats_of(x), Target(0.5)) for n in (15, 30, 2000)]
    assert all(torch.equal(one.keep, pruned[0].keep) for one in pruned)
    problem = inverted(2 * x.T @ x, 0.1, 1.0).problem
    hessian, dense = problem.gram.double(), problem.scaled(weight).double()
    best = torch.zeros_like(dense)
    for row, kept in enumerate(pruned[0].keep):
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ dense[row])[kept])
    away = [float((problem.scaled(one.weight) - best).norm()) for one in pruned]
    assert away[0] > away[1] > away[2]
    assert away[2] < 1e-3 * float(best.norm())


def test_layers_that_share_an_input_share_its_inverse(monkeypatch):
    calls = []
    monkeypatch.setattr(admm, "inverted", lambda *a: calls.append(1) or inverted(*a))
    weight, x = draw(6, 16, 40)
    stats = stats_of(x)
    for pruner in (ADMM(), ADMM("matrix"), ADMM(ramp=3)):
        pruner.prune(weight, stats, Target(0.5))
    assert len(calls) == 1
    ADMM(rho=2.0).prune(weight, stats, Target(0.5))
    ADMM(damp=0.2).prune(weight, stats, Target(0.5))
    assert len(calls) == 3
