import inspect
import math

import pytest

from sparsify.errors import PatternError, UsageError
from sparsify.types import Ledger, Pattern, SparsityPlan, Target, check_sparsity


@pytest.mark.parametrize(
    ("text", "group", "kept", "sparsity"),
    [
        ("unstructured", None, None, None),
        ("2:4", 4, 2, 0.5),
        ("1:4", 4, 1, 0.75),
        ("2:8", 8, 2, 0.75),
        ("4:4", 4, 4, 0.0),
        ("mixed:8", 8, None, None),
    ],
)
def test_a_pattern_counts_kept_weights_and_prints_as_it_was_read(text, group, kept, sparsity):
    pattern = Pattern.parse(text)
    assert (pattern.group, pattern.kept, pattern.sparsity) == (group, kept, sparsity)
    assert str(pattern) == text
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize("text", ["5:4", "0:4", "1:1", "mixed:1", "2-4", "2:4 ", "mixed", "", "N:M", "-1:4", "2:4:8"])
def test_a_bad_pattern_is_refused(text):
    with pytest.raises(PatternError):
        Pattern.parse(text)


def test_a_pattern_that_yaml_read_as_a_number_is_refused():
    parse = inspect.unwrap(Pattern.parse.__func__)  # without the type checker of the test run
    with pytest.raises(PatternError):
        parse(Pattern, 124)  # yaml's reading of an unquoted 2:4


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_target_is_a_fraction(value):
    with pytest.raises(UsageError):
        Target(value)


unchecked = inspect.unwrap(check_sparsity)  # as users call it, without the type checker of the test run


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 70, math.nan, math.inf, "x", None])
def test_a_sparsity_outside_its_range_is_refused(value):
    with pytest.raises(UsageError, match="0 <= sparsity < 1"):
        unchecked(value)


def test_a_percentage_is_answered_with_its_fraction():
    with pytest.raises(UsageError, match=r"Fix: sparsity=0\.7\."):
        unchecked(70)


@pytest.mark.parametrize("value", [0, 0.7, "0.7"])
def test_a_sparsity_comes_back_as_a_float(value):
    assert unchecked(value) == float(value)


def test_a_table_counts_weights_by_block(make_table):
    table = make_table([(2, 3), (4, 5)], [(6, 7)])
    assert (len(table), table.num_blocks, table.numel) == (3, 2, 68)
    assert table.block_numels() == [26, 42]
    assert table.spread([0.1, 0.9]) == {"blocks.0.layer0": 0.1, "blocks.0.layer1": 0.1, "blocks.1.layer0": 0.9}


def test_a_plan_survives_its_rows():
    plan = SparsityPlan({"a": Target(0.5, 2, 4), "b": Target(0.25)}, Ledger(0.4, 0.41, 0.4, 0.4, 1))
    again = SparsityPlan.from_rows(plan.to_rows(), vars(plan.ledger))
    assert (again.targets, again.ledger) == (plan.targets, plan.ledger)
    assert list(again.sparsities()) == ["a", "b"]
