import inspect
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparsify.errors import NumericsError, PatternError, UsageError
from sparsify.pruners.masks import keep_mask, num_zeros, slab_counts
from sparsify.types import Target

SPARSITY = st.one_of(st.floats(0, 1), st.integers(0, 20).map(lambda i: i / 20))


@st.composite
def score_matrices(draw, multiple=1):
    """Small matrices of few distinct values, so that ties are common."""
    rows, cols = draw(st.integers(1, 6)), multiple * draw(st.integers(1, 12 // multiple))
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, math.inf])
    return torch.tensor(draw(st.lists(st.lists(values, min_size=cols, max_size=cols), min_size=rows, max_size=rows)))


def removed_by_sorting(scores, count):
    """Positions of the `count` lowest of a flat list, leftmost first among equals."""
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return set(ranked[:count])


def zeros(mask):
    return {i for i, kept in enumerate(mask.flatten().tolist()) if not kept}


@settings(max_examples=40, deadline=None)
@given(score_matrices(), SPARSITY)
def test_each_row_loses_its_lowest_scores(scores, sparsity):
    keep = keep_mask(scores, Target(sparsity), "row")
    count = num_zeros(scores.shape[1], sparsity)
    for row, mask in zip(scores, keep, strict=True):
        assert zeros(mask) == removed_by_sorting(row.tolist(), count)


@settings(max_examples=40, deadline=None)
@given(score_matrices(), SPARSITY)
def test_the_matrix_loses_its_lowest_scores(scores, sparsity):
    keep = keep_mask(scores, Target(sparsity), "matrix")
    assert zeros(keep) == removed_by_sorting(scores.flatten().tolist(), num_zeros(scores.numel(), sparsity))


@settings(max_examples=40, deadline=None)
@given(score_matrices(), SPARSITY, st.integers(1, 5))
def test_each_slab_loses_its_lowest_scores_and_the_total_is_that_of_the_matrix(scores, sparsity, columns):
    keep = keep_mask(scores, Target(sparsity), "columns", columns)
    for start in range(0, scores.shape[1], columns):
        slab, mask = scores[:, start : start + columns], keep[:, start : start + columns]
        count = int((~mask).sum())
        assert abs(count - sparsity * slab.numel()) <= 1 + 1e-6
        assert zeros(mask) == removed_by_sorting(slab.flatten().tolist(), count)
    assert int((~keep).sum()) == num_zeros(scores.numel(), sparsity)


@settings(max_examples=40, deadline=None)
@given(score_matrices(multiple=4), st.integers(1, 4))
def test_every_group_of_m_keeps_its_n_highest(scores, kept):
    keep = keep_mask(scores, Target(1 - kept / 4, kept, 4))
    for group, mask in zip(scores.reshape(-1, 4), keep.reshape(-1, 4), strict=True):
        assert zeros(mask) == removed_by_sorting(group.tolist(), 4 - kept)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), SPARSITY, st.integers(1, 128))
def test_slabs_cover_the_inputs_once_and_zero_what_fits(rows, inputs, sparsity, columns):
    slabs = slab_counts(rows, inputs, sparsity, columns)
    assert [i for start, end, _ in slabs for i in range(start, end)] == list(range(inputs))
    assert all(0 <= count <= rows * (end - start) for start, end, count in slabs)
    assert sum(count for *_, count in slabs) == num_zeros(rows * inputs, sparsity)


@pytest.mark.parametrize(
    ("count", "sparsity", "zeroed"),
    [(10, 0.7, 7), (576, 0.55, 316), (100, 0.29, 29), (3, 1.0, 3), (3, 0.33, 0), (7, 0.0, 0)],
)
def test_counts_round_down_without_float_noise(count, sparsity, zeroed):
    assert num_zeros(count, sparsity) == zeroed


@pytest.mark.parametrize("group", ["row", "matrix", "columns"])
def test_constant_scores_do_not_overshoot(group):
    assert int((~keep_mask(torch.ones(8, 32), Target(0.7), group)).sum()) == {"row": 176}.get(group, 179)


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, 2, 4)])
@pytest.mark.parametrize("group", ["row", "matrix", "columns"])
def test_a_nan_score_is_refused(group, target):
    scores = torch.rand(4, 8)
    scores[2, 3] = math.nan
    with pytest.raises(NumericsError):
        keep_mask(scores, target, group)


def test_m_must_divide_the_inputs():
    with pytest.raises(PatternError, match="M = 4, inputs = 10"):
        keep_mask(torch.rand(2, 10), Target(0.5, 2, 4))


def test_an_unknown_group_is_refused():
    with pytest.raises(UsageError):
        inspect.unwrap(keep_mask)(torch.rand(2, 4), Target(0.5), "rows")
