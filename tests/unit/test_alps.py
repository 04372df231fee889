import pytest
import torch
from problems import draw, stats_of

from sparsify.errors import NumericsError
from sparsify.pruners import alps
from sparsify.pruners.alps import ALPS, Spectrum, admm, conjugate_gradients, decomposed, grown
from sparsify.pruners.masks import keep_mask
from sparsify.pruners.normalised import Normalised
from sparsify.types import Target


def best_on(keep, weight, x, damp=0.01):
    """Row by row, the least squares of ||X w - X v||^2 + lambda ||w - v||^2 on the kept inputs, in double precision."""
    weight, x = weight.double(), x.double()
    lam = damp * x.square().sum(dim=0).mean()
    system = torch.cat([x, lam.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    new = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        new[row, kept] = torch.linalg.lstsq(system[:, kept], system @ weight[row]).solution
    return new


@pytest.mark.parametrize("target", [Target(0.25), Target(0.5), Target(0.8), Target(0.5, 2, 4)], ids=str)
@pytest.mark.parametrize("group", ["matrix", "row"])
def test_weights_on_the_support_are_those_of_least_squares(target, group):
    weight, x = draw(6, 16, 40)
    pruned = ALPS(group, refine=100).prune(weight, stats_of(x), target)
    torch.testing.assert_close(pruned.weight.double(), best_on(pruned.keep, weight, x), rtol=2e-3, atol=2e-3)


def test_ten_steps_of_the_refinement_take_most_of_the_way():
    weight, x = draw(24, 32, 200)
    none, ten = (ALPS(refine=steps).prune(weight, stats_of(x), Target(0.7)) for steps in (0, 10))
    assert torch.equal(none.keep, ten.keep)
    best = best_on(ten.keep, weight, x)
    before, after = (((new.double() - best) @ x.double().T).norm() for new in (none.weight, ten.weight))
    assert after < 0.05 * before


def test_the_refinement_starts_from_the_weights_that_admm_found():
    weight, x = draw(24, 32, 200)
    spectrum = decomposed(stats_of(x).gram, 0.01)
    dense, target = spectrum.problem.scaled(weight), Target(0.7)
    found, _ = admm(dense, spectrum, lambda sizes: keep_mask(sizes, target, "matrix"), 0.1, 300)
    pruned = ALPS(refine=0).prune(weight, stats_of(x), target)
    assert torch.equal(pruned.weight, spectrum.problem.restored(found, weight, pruned.keep))


def test_every_step_of_the_conjugate_gradients_lowers_the_error_and_keeps_the_support():
    x = torch.randn(40, 8)
    gram, keep = x.T @ x / 40, torch.rand(5, 8) > 0.4
    dense = torch.randn(5, 8)
    new = [conjugate_gradients(dense * keep, keep, gram, dense @ gram, steps) for steps in range(9)]
    losses = torch.stack([(((dense - one) @ gram) * (dense - one)).sum(dim=1) for one in new])
    assert (losses[1:5] < losses[:4]).all()
    assert not torch.stack(new)[:, ~keep].any()
    solved = torch.zeros_like(dense)
    for row, kept in enumerate(keep):
        solved[row, kept] = torch.linalg.solve(gram[kept][:, kept], (dense[row] @ gram)[kept])
    torch.testing.assert_close(new[-1], solved, rtol=1e-4, atol=1e-4)


def test_rows_that_are_solved_stay_solved():
    gram = torch.eye(4)
    keep = torch.tensor([[True] * 4, [False] * 4, [True, False] * 2])
    dense = torch.randn(3, 4)
    assert torch.equal(conjugate_gradients(dense * keep, keep, gram, dense, 10), dense * keep)


def naive_admm(dense, gram, kept, rho, iterations):
    """Eq. 4 and 28 in loops over a matrix of a few numbers, with a linear system solved for every row."""
    rows, inputs = dense.shape
    places = [(i, j) for i in range(rows) for j in range(inputs)]

    def project(values):
        top = sorted(places, key=lambda p: -abs(values[p]))[:kept]
        return {p: values[p] if p in top else 0.0 for p in places}

    weight = {(i, j): float(dense[i, j]) for i, j in places}
    hat, sparse, dual = dict(weight), project(weight), dict.fromkeys(places, 0.0)
    before, rates = {p for p in places if sparse[p]}, [rho]
    for step in range(1, iterations + 1):
        for i in range(rows):
            right = [
                sum(hat[i, k] * float(gram[k, j]) for k in range(inputs)) - dual[i, j] + rho * sparse[i, j]
                for j in range(inputs)
            ]
            system = gram + rho * torch.eye(inputs, dtype=gram.dtype)
            for j, value in enumerate(torch.linalg.solve(system, torch.tensor(right, dtype=gram.dtype)).tolist()):
                weight[i, j] = value
        sparse = project({p: weight[p] + dual[p] / rho for p in places})
        for p in places:
            dual[p] += rho * (weight[p] - sparse[p])
        if step % 3 == 0:
            support = {p for p in places if sparse[p]}
            changed = len(support ^ before)
            if not changed:
                return weight, rates, True
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            before = support
            rates.append(rho)
    return weight, rates, False


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kept", "iterations"), [(6, 1), (6, 3), (5, 7), (7, 100)])
def test_the_updates_are_those_of_the_paper(seed, kept, iterations, monkeypatch):
    rates = []
    monkeypatch.setattr(alps, "grown", lambda rho, share: rates.append(grown(rho, share)) or rates[-1])
    weight, x = draw(3, 4, 9, seed)
    spectrum = decomposed(x.T @ x, 0.01)
    dense = spectrum.problem.scaled(weight)
    target = Target(1 - kept / 12)
    found, settled = admm(dense, spectrum, lambda sizes: keep_mask(sizes, target, "matrix"), 0.1, iterations)
    expected, naive_rates, naive_settled = naive_admm(dense, spectrum.problem.gram.double(), kept, 0.1, iterations)
    listed = torch.tensor([[expected[i, j] for j in range(4)] for i in range(3)])
    torch.testing.assert_close(found, listed, rtol=1e-3, atol=1e-3)
    assert [0.1, *rates] == pytest.approx(naive_rates)
    assert settled == naive_settled


def test_some_of_these_draws_raise_the_penalty_and_some_do_not():
    grew = []
    for seed in range(6):
        weight, x = draw(3, 4, 9, seed)
        problem = decomposed(x.T @ x, 0.01).problem
        grew.append(len(naive_admm(problem.scaled(weight), problem.gram.double(), 7, 0.1, 100)[1]) > 1)
    assert any(grew)
    assert not all(grew)


@pytest.mark.parametrize(
    ("share", "factor"), [(1.0, 1.3), (0.1, 1.3), (0.0999, 1.2), (0.005, 1.2), (0.00499, 1.1), (1e-6, 1.1)]
)
def test_the_penalty_grows_by_the_share_of_the_support_that_changed(share, factor):
    assert grown(2.0, share) == 2.0 * factor


def looks(dense, *masks):
    """ADMM where the selection hands out these masks, one for every look at the support; how many of them it took."""
    asked = []

    def select(values):
        asked.append(len(asked))
        return masks[min(-(-asked[-1] // alps.EVERY), len(masks) - 1)]

    eye = torch.eye(dense.shape[1])
    spectrum = Spectrum(Normalised(eye, eye[0] + 1), eye[0] + 1, eye)
    return admm(dense, spectrum, select, 0.1, 300)[1], len(asked) - 1


def test_a_support_that_does_not_change_ends_admm_at_the_first_look():
    assert looks(torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)) == (True, 3)


@pytest.mark.parametrize(("changed", "steps"), [(2, 33), (4, 36)])
def test_after_thirty_iterations_two_changes_in_ten_thousand_are_enough(changed, steps):
    one, other = torch.ones(2, 5_000, 2, dtype=torch.bool)
    other[:changed, 0] = False
    assert looks(torch.randn(5_000, 2), *[one, other] * 6) == (True, steps)


def test_a_support_that_still_changes_is_noted():
    weight, x = draw(6, 16, 40)
    assert "after 3 iterations" in ALPS(iterations=3).prune(weight, stats_of(x), Target(0.5)).notes["unsettled"]
    assert ALPS().prune(weight, stats_of(x), Target(0.5)).notes == {}


@pytest.mark.parametrize("rho", [0.01, 0.1, 5.0])
def test_one_decomposition_gives_the_inverse_for_every_penalty(rho):
    _, x = draw(6, 16, 40)
    spectrum = decomposed(x.T @ x, 0.01)
    exact = torch.linalg.inv(spectrum.problem.gram.double() + rho * torch.eye(16))
    torch.testing.assert_close(spectrum.inverse(rho).double(), exact, rtol=1e-3, atol=1e-4 / rho)


def test_layers_that_share_an_input_share_its_decomposition(monkeypatch):
    calls = []
    monkeypatch.setattr(alps, "decomposed", lambda *a: calls.append(1) or decomposed(*a))
    weight, x = draw(6, 16, 40)
    stats = stats_of(x)
    for pruner in (ALPS(), ALPS("row"), ALPS(rho=1.0)):
        pruner.prune(weight, stats, Target(0.5))
    assert len(calls) == 1
    ALPS(damp=0.1).prune(weight, stats, Target(0.5))
    ALPS().prune(weight, stats_of(x), Target(0.5))
    assert len(calls) == 3


def test_a_decomposition_that_fails_says_what_was_tried(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(NumericsError, match=r"16 inputs of norm one, damp=0\.01"):
        ALPS().prune(torch.randn(6, 16), stats_of(torch.randn(40, 16)), Target(0.5))
