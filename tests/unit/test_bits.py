"""Bits shared out by block: more sparsity, fewer bits, and a mean that is met exactly."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.allocators.arithmetic import progression
from sparsify.allocators.bits import LEVELS, check_bits, rounded, shared_bits, sparsity_of
from sparsify.errors import UsageError
from sparsify.types import LayerSpec, LayerTable


def by_block(table, bits):
    found = {}
    for layer in table:
        assert found.setdefault(layer.block, bits[layer.name]) == bits[layer.name], "one number for each block"
    return list(found.values())


def mean_of(table, bits):
    return sum(bits[layer.name] * layer.numel for layer in table) / table.numel


def nearest_mean(sizes, mean):
    """By trying all choices."""
    choices = product(LEVELS, repeat=len(sizes))
    sums = {sum(size * level for size, level in zip(sizes, levels, strict=True)) for levels in choices}
    return min(sums, key=lambda total: (abs(total - mean * sum(sizes)), total))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_uniform_rule_gives_every_block_the_mean(blocks, bits):
    table = blocks(6)
    sparsities = dict.fromkeys((layer.name for layer in table), sparsity_of(bits))
    assert set(shared_bits(table, sparsities, bits).values()) == {bits}


def test_a_progression_gives_fewer_bits_with_depth(blocks):
    table = blocks(12)
    sparsities = table.spread(progression(sparsity_of(3.5), 0.01, 12))
    bits = by_block(table, shared_bits(table, sparsities, 3.5))
    assert bits == sorted(bits, reverse=True)
    assert sum(bits) == 3.5 * 12
    assert len(set(bits)) > 1
    assert by_block(table, shared_bits(table, table.spread(progression(sparsity_of(3.5), -0.01, 12)), 3.5))[0] < bits[0]


def test_what_every_block_wants_is_what_it_gets_where_that_is_a_level():
    assert rounded([8.0, 4.0, 4.0, 3.0, 2.0, 3.0], [5, 1, 2, 2, 1, 3], (40 + 4 + 8 + 6 + 2 + 9) / 14) == [
        8,
        4,
        4,
        3,
        2,
        3,
    ]


def test_of_blocks_that_want_the_same_the_first_ones_get_more():
    assert rounded([3.5] * 6, [7] * 6, 3.5) == [4, 4, 4, 3, 3, 3]


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_the_mean_is_as_near_as_any_choice_of_levels_comes(sizes, data):
    wanted = [data.draw(st.floats(2, 8)) for _ in sizes]
    mean = sum(x * size for x, size in zip(wanted, sizes, strict=True)) / sum(sizes)
    levels = rounded(wanted, sizes, mean)
    assert set(levels) <= set(LEVELS)
    assert sum(size * level for size, level in zip(sizes, levels, strict=True)) == nearest_mean(sizes, mean)


@given(sizes, st.sampled_from([2, 2.25, 2.5, 3, 3.5, 4, 5.5, 8]), st.data())
@settings(max_examples=60, deadline=None)
def test_any_sparsities_of_unequal_blocks_end_on_the_budget(sizes, bits, data):
    table = LayerTable(tuple(LayerSpec(f"b{i}.x", i, "x", size, 3) for i, size in enumerate(sizes)))
    sparsities = {layer.name: data.draw(st.floats(0.01, 0.99)) for layer in table}
    found = shared_bits(table, sparsities, bits)
    assert mean_of(table, found) * sum(sizes) == pytest.approx(nearest_mean(sizes, bits))
    if len(set(sizes)) == 1:  # sparser blocks never get more
        assert all(found[a] >= found[b] for a in found for b in found if sparsities[a] < sparsities[b] - 1e-9)


def test_layers_of_a_block_count_by_their_size(unequal):
    """A block of one small sparse matrix and a large dense one is nearly dense."""
    sparsities = {layer.name: 0.75 for layer in unequal} | {"blocks.1.layer0": 0.99, "blocks.1.layer1": 0.6}
    bits = shared_bits(unequal, sparsities, 4)
    assert bits["blocks.1.layer0"] == bits["blocks.1.layer1"] >= max(bits.values())


@pytest.mark.parametrize("bits", [1, 1.99, 8.5, 16, float("nan")])
def test_a_mean_beyond_the_levels_is_refused(bits):
    with pytest.raises(UsageError, match=r"Allowed: 2 to 8.*Fix: bits="):
        check_bits(bits)
