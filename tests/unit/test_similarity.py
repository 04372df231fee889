"""Similarity of blocks against explicit features in NumPy, its linear program against another solver."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from sparsify.allocators.base import allocate
from sparsify.allocators.context import Context
from sparsify.allocators.similarity import Similarity, bounds, released_d, solve, total_similarity
from sparsify.analysis.similarity import block_similarity, sample_gram
from sparsify.data.inputs import TokenInputs
from sparsify.errors import NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.walk import Walk
from sparsify.report import figures, frame, layouts
from sparsify.report.layouts.base import Page, Row
from sparsify.report.layouts.perplexities import Perplexities

WINDOWS = torch.randint(0, 96, (7, 13), generator=torch.Generator().manual_seed(4))
SHARED = WINDOWS.clone()
SHARED[:, 0] = 1


@pytest.fixture(scope="module")
def view(make_model):
    return BlockView(make_model(num_hidden_layers=5))


def block_inputs(view, tokens):
    """The hidden states before every block in the model's own forward, a row a window."""
    found = []
    handles = [b.register_forward_pre_hook(lambda _m, args: found.append(args[0].clone())) for b in view.blocks]
    with torch.no_grad():
        view.model(tokens)
    for handle in handles:
        handle.remove()
    return [x.flatten(1).double().numpy() for x in found]


def brute_force(features, centred):
    """Both measures as their papers write them: by the products of features."""
    features = [x - x.mean(0) if centred else x for x in features]

    def inner(x, y):
        return np.square(y.T @ x).sum()

    return np.array([[inner(x, y) / math.sqrt(inner(x, x) * inner(y, y)) for y in features] for x in features])


@pytest.mark.parametrize("centred", [True, False], ids=["cka", "hsic"])
@pytest.mark.parametrize("tokens", [WINDOWS, SHARED], ids=["any", "one token in common"])
def test_the_matrix_is_that_of_explicit_features(view, tokens, centred):
    matrix = block_similarity(Walk(view, tokens), centred=centred)
    expected = brute_force(block_inputs(view, tokens), centred)
    assert expected.min() < 0.95
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [1.0] * 5


@pytest.mark.parametrize("centred", [True, False], ids=["cka", "hsic"])
def test_neither_the_chunk_nor_the_batch_changes_it(view, centred):
    whole = block_similarity(Walk(view, WINDOWS, 7), centred=centred, positions=13)
    for batch, positions in ((1, 13), (7, 1), (3, 5), (2, 64)):
        other = block_similarity(Walk(view, WINDOWS, batch), centred=centred, positions=positions)
        torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-6)


def test_the_gram_is_doubly_centred():
    hidden = torch.randn(6, 9, 4) + 300
    rows = hidden.flatten(1).double()
    centre = torch.eye(6, dtype=torch.float64) - 1 / 6
    torch.testing.assert_close(sample_gram(hidden, positions=4), centre @ rows @ rows.T @ centre, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sample_gram(hidden, centred=False), rows @ rows.T)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_huge_and_tiny_states_neither_overflow_nor_vanish(size, view, monkeypatch):
    plain = block_similarity(Walk(view, WINDOWS))

    def scaled(hidden, **options):
        return sample_gram(hidden * size, **options)

    monkeypatch.setattr("sparsify.analysis.similarity.sample_gram", scaled)
    torch.testing.assert_close(block_similarity(Walk(view, WINDOWS)), plain, rtol=1e-5, atol=1e-6)


def test_what_all_windows_share_is_no_similarity(view):
    with pytest.raises(NumericsError, match="block 1 of 5 are the same in every window"):
        block_similarity(Walk(view, WINDOWS[:1].repeat(5, 1)))


def test_two_windows_say_nothing(view):
    with pytest.raises(UsageError, match="at least 3"):
        block_similarity(Walk(view, WINDOWS[:2]))


def test_states_that_are_not_finite_name_their_block(make_model):
    view = BlockView(make_model(num_hidden_layers=3))
    walk = Walk(view, WINDOWS)
    with torch.no_grad():
        view.blocks[1].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(NumericsError, match="block 3 of 3 are not finite"):
        block_similarity(walk)


# The rule


def test_the_rule_by_hand():
    matrix = [[1.0, 0.5, 0.25], [0.5, 1.0, 0.75], [0.25, 0.75, 1.0]]
    assert total_similarity(matrix) == pytest.approx([0.75 / 3, 1.25 / 3, 1.0 / 3])
    importance = [math.exp(-t) for t in total_similarity(matrix)]
    assert solve(importance, [4, 4, 4], 0.7, 0.03) == pytest.approx([0.67, 0.73, 0.7])
    # 12 of 20 weights and 0.06 each above the lower bound: 0.6 in all, of which block 1 takes 0.12, block 2 0.48.
    assert solve(importance, [10, 2, 8], 0.7, 0.03) == pytest.approx([0.67, 0.73, 0.73])
    assert solve(importance, [2, 10, 8], 0.7, 0.03) == pytest.approx([0.67, 0.73, 0.67])
    assert solve(importance, [2, 16, 2], 0.7, 0.03) == pytest.approx([0.67, 0.67 + 0.06 * 10 / 16, 0.67])


@pytest.mark.parametrize("solver", ["exact", "slsqp"])
def test_one_block_is_uniform(solver):
    assert total_similarity([[1.0]]) == [0.0]
    assert solve([1.0], [6], 0.5, 0.01, solver) == pytest.approx([0.5])


def test_equal_importances_rank_as_they_come():
    assert solve([0.5] * 4, [3] * 4, 0.5, 0.01) == pytest.approx([0.51, 0.51, 0.49, 0.49])


@given(
    blocks=st.lists(st.tuples(st.floats(0.1, 1.0), st.integers(1, 50)), min_size=1, max_size=20),
    equal=st.booleans(),
    sparsity=st.floats(0.005, 0.995),
    d=st.floats(0, 0.2),
)
def test_the_sort_is_the_optimum_of_the_linear_program(blocks, equal, sparsity, d):
    importance, sizes = [i for i, _ in blocks], [1 if equal else size for _, size in blocks]
    values, (low, high) = np.array(solve(importance, sizes, sparsity, d)), bounds(sparsity, d)
    cost = np.multiply(importance, sizes) / sum(sizes)
    best = linprog(cost, A_eq=[np.array(sizes) / sum(sizes)], b_eq=[sparsity], bounds=(low, high), method="highs")
    assert cost @ values == pytest.approx(best.fun, abs=1e-7)
    assert np.average(values, weights=sizes) == pytest.approx(sparsity, abs=1e-12)
    assert values.min() >= low
    assert values.max() <= high


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("count", [7, 30])
def test_a_random_program_has_the_solution_of_highs(count, sizes):
    random = np.random.default_rng(count)
    importance = random.uniform(0.5, 1, count)
    sizes = [5] * count if sizes == "equal" else random.integers(1, 9, count).tolist()
    best = linprog(importance * sizes, A_eq=[sizes], b_eq=[0.6 * sum(sizes)], bounds=(0.58, 0.62), method="highs")
    assert solve(importance.tolist(), sizes, 0.6, 0.02) == pytest.approx(best.x.tolist(), abs=1e-9)


@pytest.mark.parametrize("sizes", [[5] * 12, [5] * 13, [2, 3, 4] * 4])
def test_slsqp_comes_near_the_optimum_within_the_bounds(sizes):
    importance = np.random.default_rng(0).uniform(0.5, 1, len(sizes)).tolist()
    exact, found = (np.array(solve(importance, sizes, 0.7, 0.03, solver)) for solver in ("exact", "slsqp"))
    assert np.average(found, weights=sizes) == pytest.approx(0.7, abs=1e-9)
    low, high = bounds(0.7, 0.03)
    assert low <= found.min() < found.max() <= high
    worth = np.multiply(importance, sizes)
    assert worth @ exact <= worth @ found + 1e-12
    assert worth @ (found - exact) < 0.02 * worth @ (np.full(len(sizes), 0.7) - exact)


@pytest.mark.parametrize(
    ("sparsity", "d"), [(0.3, 0.01), (0.5, 0.01), (0.51, 0.02), (0.6, 0.02), (0.7, 0.03), (0.9, 0.03)]
)
def test_the_releases_d(sparsity, d):
    assert released_d(sparsity) == d


# The allocator


def plan_of(view, allocator, sparsity=0.7, tokens=WINDOWS):
    return allocate(allocator, view.table, sparsity, Context(view, TokenInputs(tokens)))


def by_block(plan, view):
    return [plan.targets[next(x.name for x in view.table if x.block == b)].sparsity for b in range(len(view.blocks))]


@pytest.mark.parametrize("measure", ["cka", "hsic"])
def test_blocks_like_all_others_are_pruned_more(view, measure):
    plan = plan_of(view, Similarity(measure))
    matrix = brute_force(block_inputs(view, WINDOWS), measure == "cka")
    order = np.argsort(-matrix.sum(1))
    assert np.array(by_block(plan, view))[order] == pytest.approx([0.73, 0.73, 0.7, 0.67, 0.67], abs=1e-9)
    np.testing.assert_allclose(plan.notes["similarity"], matrix, atol=6e-5)
    assert plan.notes["total_similarity"] == pytest.approx((matrix.sum(1) - 1) / (matrix.sum() - 5))
    assert plan.notes["importance"] == pytest.approx([math.exp(-t) for t in plan.notes["total_similarity"]])


@pytest.mark.parametrize("solver", ["exact", "slsqp"])
@pytest.mark.parametrize("sparsity", [0.005, 0.5, 0.7, 0.985, 0.995])
def test_the_budget_and_the_bounds_are_kept(view, solver, sparsity):
    plan = plan_of(view, Similarity(solver=solver), sparsity)
    mean = sum(plan.targets[x.name].sparsity * x.numel for x in view.table) / view.table.numel
    assert mean == pytest.approx(sparsity, abs=1e-12)
    low, high = bounds(sparsity, released_d(sparsity))
    assert all(low <= value <= high for value in plan.sparsities().values())


def test_b_is_of_no_matter_to_the_exact_solution(view):
    plans = [by_block(plan_of(view, Similarity(b=b)), view) for b in (0.01, 1.0, 100.0, 1000.0)]
    assert plans == [plans[0]] * 4


@pytest.mark.parametrize("solver", ["exact", "slsqp"])
def test_without_room_it_is_uniform(view, solver):
    assert by_block(plan_of(view, Similarity(d=0.0, solver=solver)), view) == pytest.approx([0.7] * 5)


def test_it_reads_the_first_windows_only_and_leaves_the_model_alone(view):
    few, whole = (plan_of(view, Similarity(windows=4), tokens=tokens).notes for tokens in (WINDOWS[:4], WINDOWS))
    assert few == whole != plan_of(view, Similarity(windows=None)).notes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"windows": 2},
        {"b": 0.0},
        {"b": math.nan},
        {"b": 1e6},
        {"d": -0.01},
        {"d": 0.5},
        {"d": math.nan},
    ],
)
def test_bad_hyper_parameters_are_refused(options):
    with pytest.raises(UsageError):
        Similarity(**options)


# The figure

NOTED = {"total_similarity": [0.3, 0.4, 0.3], "similarity": [[1.0, 0.9987, 0.5], [0.9987, 1.0, 0.6], [0.5, 0.6, 1.0]]}


def test_the_matrix_is_in_the_rows_and_comes_back():
    assert frame._noted(NOTED) == {
        "noted.total_similarity": "0.3|0.4|0.3",
        "noted.similarity": "1|0.9987|0.5;0.9987|1|0.6;0.5|0.6|1",
    }
    cells = pd.DataFrame([{"allocator.measure": "cka"} | frame._noted(NOTED), {"allocator": "uniform"}])
    assert frame.similarities(cells) == {"cka": NOTED["similarity"]}
    assert frame.similarities(cells[["allocator"]]) == {}


def test_the_figure_is_drawn_and_the_same_twice(tmp_path):
    matrices = {"cka": NOTED["similarity"], "hsic": [[1.0]]}
    files = [figures.cka_matrix(tmp_path / name, "cka", matrices, "title") for name in ("a", "b")]
    assert [file.name for file in files[0]] == ["cka.png", "cka.pdf"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_a_table_draws_it_where_a_cell_was_allocated_by_it(tmp_path):
    common = {"key": "a", "model": "m", "pruner": "wanda", "sparsity": 0.7, "test": 9.0, "test.protocol": "t@8"}
    plain = common | {"allocator": "uniform", "block_sparsity": "0.7|0.7|0.7"}
    noted = common | {"key": "b", "allocator": "similarity", "allocator.measure": "cka"} | frame._noted(NOTED)
    rows = [Row("uniform", {"allocator": "uniform"}), Row("similarity", {"allocator": "similarity"})]
    layout = Perplexities(
        title="t", layout="perplexities", parts=[], pruners=["wanda"], rows=rows, paper=layouts.load("table1").paper
    )
    names = []
    for cells in (pd.DataFrame([plain]), pd.DataFrame([plain, noted])):
        page = Page(cells, cells, "table", "m_s", "title", [], tmp_path, tmp_path)
        names.append({file.name for file in layout.write(page)})
    assert names[1] - names[0] == {"cka_m_s.png", "cka_m_s.pdf"}
