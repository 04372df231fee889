"""Layer tables that the tests of allocators share."""

import pytest


@pytest.fixture(scope="session")
def blocks(make_table):
    """L equal blocks of two matrices."""
    return lambda number: make_table(*([[(8, 6), (4, 8)]] * number))


@pytest.fixture
def unequal(make_table):
    """Three blocks of different sizes."""
    return make_table([(12, 6)], [(3, 6), (5, 8)], [(20, 4)])
