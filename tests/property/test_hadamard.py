"""Properties of Hadamard matrices and their orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corequant.errors import HadamardOrderError
from corequant.hadamard import (
    hadamard_factors,
    hadamard_matrix,
    hadamard_orders,
    valid_block_sizes,
)

ORDERS = hadamard_orders(2**14)
SMALL_ORDERS = [n for n in ORDERS if n <= 256]
KNOWN = frozenset(ORDERS)


@given(st.sampled_from(SMALL_ORDERS))
def test_rows_and_columns_are_orthogonal(n):
    matrix = hadamard_matrix(n).astype(np.int64)
    scaled_identity = n * np.eye(n, dtype=np.int64)
    np.testing.assert_array_equal(matrix @ matrix.T, scaled_identity)
    np.testing.assert_array_equal(matrix.T @ matrix, scaled_identity)


@given(st.integers(1, 2**14))
def test_factors_exist_exactly_for_the_listed_orders(n):
    if n not in KNOWN:
        with pytest.raises(HadamardOrderError, match=f"order n={n} can"):
            hadamard_factors(n)
        return
    core_order, power_of_two = hadamard_factors(n)
    assert core_order * power_of_two == n
    assert power_of_two & (power_of_two - 1) == 0
    # The core is the smallest: half of it has no construction.
    assert core_order == 1 or core_order // 2 not in KNOWN


@given(st.sampled_from(ORDERS), st.integers(0, 8))
def test_doubling_keeps_the_core(n, doublings):
    core_order, power_of_two = hadamard_factors(n)
    assert hadamard_factors(n * 2**doublings) == (core_order, power_of_two * 2**doublings)


@given(st.sampled_from(SMALL_ORDERS[:24]), st.sampled_from(SMALL_ORDERS[:24]))
def test_orders_are_closed_under_products(left, right):
    assert left * right in KNOWN


@given(st.integers(1, 2**14))
def test_block_sizes_are_the_listed_divisors(d):
    assert valid_block_sizes(d) == tuple(b for b in ORDERS if b >= 2 and d % b == 0)


@given(st.integers(1, 2**14))
def test_orders_are_a_prefix_of_longer_lists(limit):
    assert hadamard_orders(limit) == tuple(n for n in ORDERS if n <= limit)
