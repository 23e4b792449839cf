"""Hadamard matrices: exactness, coverage of orders, choice of core, errors, documentation."""

from __future__ import annotations

import doctest
import hashlib
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest

from corequant import hadamard
from corequant.errors import CorequantError, HadamardOrderError
from corequant.hadamard import (
    hadamard_factors,
    hadamard_matrix,
    hadamard_orders,
    valid_block_sizes,
)

MANDATORY = (1, 2, 12, 20, 28, 36, 40, 52, 60, 76, 92, 108, 116, 140, 152, 156, 172, 244)
# Multiples of 4 that need a construction beyond Paley's, a Williamson array or a product.
MISSING_TO_512 = (
    *(188, 236, 260, 268, 292, 324, 356, 372, 376),
    *(404, 412, 428, 436, 452, 472, 476, 508),
)
WORKING = "block sizes that divide it and work"
# Odd prime powers p^k with k > 1: these need arithmetic beyond integers modulo p.
PRIME_POWERS = (9, 25, 27, 49, 81, 121, 125, 169, 243, 289, 343, 361, 625, 729)


def assert_hadamard(matrix: np.ndarray, n: int) -> None:
    assert matrix.shape == (n, n)
    assert matrix.dtype == np.int8
    assert set(np.unique(matrix)) <= {-1, 1}
    # Sums of n products ±1 are exact in float64, and its product is much faster than an integer's.
    wide = matrix.astype(np.float64)
    np.testing.assert_array_equal(wide @ wide.T, n * np.eye(n))


@pytest.mark.parametrize("n", hadamard_orders(512))
def test_every_claimed_order_is_exact(n):
    assert_hadamard(hadamard_matrix(n), n)


@pytest.mark.parametrize("n", [924, 1252, 1460, 1536])
def test_larger_orders_are_exact(n):
    assert_hadamard(hadamard_matrix(n), n)


def test_claimed_orders_are_all_but_the_known_gaps():
    expected = [n for n in (1, 2, *range(4, 513, 4)) if n not in MISSING_TO_512]
    assert hadamard_orders(512) == tuple(expected)


@pytest.mark.parametrize("core", MANDATORY)
def test_mandatory_orders_and_their_power_of_two_multiples(core):
    for k in range(12):
        n = core * 2**k
        core_order, power_of_two = hadamard_factors(n)
        assert core_order * power_of_two == n
        assert power_of_two >= 2**k


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (4096, (1, 4096)),
        (12, (12, 1)),
        (144, (36, 4)),
        (576, (36, 16)),
        (1536, (12, 128)),
        (2560, (20, 128)),
        (5120, (20, 256)),
        (11008, (172, 64)),
        (13824, (108, 128)),
        (14336, (28, 512)),
        (18944, (148, 128)),
        (25600, (100, 256)),
        (29568, (924, 32)),
        (2**31, (1, 2**31)),
    ],
)
def test_factors(n, factors):
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize(
    ("order", "construction"),
    [
        (12, ("paley1", 11)),  # before Paley II, which gives 12 too, with q = 5
        (28, ("paley1", 27)),
        (36, ("paley2", 17)),
        (52, ("paley2", 25)),
        (92, ("williamson", 23)),
        (116, ("williamson", 29)),
        (156, ("williamson", 39)),
        (172, ("williamson", 43)),
        (188, None),
        (1904, ("kronecker", 28)),  # 28 x 68, where neither 4 nor 8 times 119 is a core
        (64, None),
        (40, None),  # 20 is the core, and 19 is no q for Paley II
    ],
)
def test_order_of_choice(order, construction):
    assert hadamard._construction(order) == construction


def test_product_of_cores_is_exact():
    order = 1904
    assert hadamard_factors(order) == (order, 1)
    matrix = hadamard_matrix(order)
    assert_hadamard(matrix, order)
    np.testing.assert_array_equal(matrix, np.kron(hadamard_matrix(28), hadamard_matrix(68)))


@pytest.mark.parametrize("n", [24, 80, 368, 448])
def test_matrix_is_core_times_sylvester(n):
    core_order, power_of_two = hadamard_factors(n)
    assert power_of_two > 1
    expected = np.kron(hadamard_matrix(core_order), hadamard_matrix(power_of_two))
    np.testing.assert_array_equal(hadamard_matrix(n), expected)


@pytest.mark.parametrize(
    ("n", "digest"),
    [
        (16, "4173cdf0377bf83a"),
        (12, "db7478025ce74776"),
        (28, "75a65a7aa5dd6380"),
        (36, "1a7aed2f42a8c71d"),
        (52, "7aad05503190a3c5"),
        (92, "0b3bb345d642b54b"),
        (156, "a0f5c8b3b760779a"),
    ],
)
def test_matrices_stay_the_same(n, digest):
    # Weights that were rotated and stored can't be read with another matrix of the same order.
    assert hashlib.sha256(hadamard_matrix(n).tobytes()).hexdigest()[:16] == digest


def test_result_is_read_only_and_repeatable():
    for n in (1, 12, 24):
        matrix = hadamard_matrix(n)
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 0
        np.testing.assert_array_equal(hadamard_matrix(n), matrix)


def test_not_every_matrix_is_symmetric():
    # Guards the warning that H is not its own inverse.
    matrix = hadamard_matrix(12)
    assert (matrix != matrix.T).any()


def test_numpy_integers_are_orders():
    assert hadamard_matrix(np.int32(12)).shape == (12, 12)
    assert hadamard_factors(np.uint16(1536)) == (12, 128)
    assert all(type(value) is int for value in hadamard_factors(np.uint16(1536)))


@pytest.mark.parametrize("q", [3, 5, 7, 13, 101, 257])
def test_character_of_a_prime_field_is_eulers_criterion(q):
    euler = [pow(a, (q - 1) // 2, q) for a in range(q)]
    expected = [-1 if value == q - 1 else value for value in euler]
    np.testing.assert_array_equal(hadamard._quadratic_character(q, 1), expected)


@pytest.mark.parametrize("q", PRIME_POWERS)
def test_jacobsthal_matrix_of_a_prime_power(q):
    matrix = hadamard._jacobsthal(q).astype(np.float64)
    np.testing.assert_array_equal(matrix @ matrix.T, q * np.eye(q) - np.ones((q, q)))
    np.testing.assert_array_equal(matrix.sum(axis=1), np.zeros(q))
    np.testing.assert_array_equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("m", sorted(hadamard._WILLIAMSON_SEEDS))
def test_williamson_seeds_are_needed_and_their_row_sums_fit(m):
    assert not hadamard._is_prime_power(4 * m - 1)
    assert not hadamard._is_prime_power(2 * m - 1)
    seed = hadamard._WILLIAMSON_SEEDS[m]
    half = (m + 1) // 2
    assert all(0 <= bits < 2**half for bits in seed)
    sums = [m - 4 * bits.bit_count() + 2 * (bits & 1) for bits in seed]
    assert sum(s * s for s in sums) == 4 * m


@pytest.mark.parametrize("m", [23, 29, 43])
def test_search_finds_the_stored_seeds(m):
    path = Path(__file__).parents[1] / "golden" / "search_williamson.py"
    spec = importlib.util.spec_from_file_location("search_williamson", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.search(m) == hadamard._WILLIAMSON_SEEDS[m]


@pytest.mark.parametrize(
    ("d", "sizes"),
    [
        (1, ()),
        (7, ()),
        (6, (2,)),
        (48, (2, 4, 8, 12, 16, 24, 48)),
        (188, (2, 4)),
        (100, (2, 4, 20, 100)),
    ],
)
def test_valid_block_sizes(d, sizes):
    assert valid_block_sizes(d) == sizes


@pytest.mark.parametrize(
    ("limit", "orders"), [(-4, ()), (0, ()), (1, (1,)), (3, (1, 2)), (12, (1, 2, 4, 8, 12))]
)
def test_orders_up_to_a_small_limit(limit, orders):
    assert hadamard_orders(limit) == orders


@pytest.mark.parametrize("value", [True, np.True_, 4.0, np.float64(4), "4", None, [4]])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (hadamard_matrix, "n"),
        (hadamard_factors, "n"),
        (hadamard_orders, "limit"),
        (valid_block_sizes, "d"),
    ],
)
def test_only_integers_are_taken(function, name, value):
    with pytest.raises(TypeError, match=f"{function.__name__}: {name} must be an integer, got"):
        function(value)


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize("function", [hadamard_matrix, hadamard_factors, valid_block_sizes])
def test_values_below_one_are_refused(function, value):
    with pytest.raises(HadamardOrderError, match=f"must be at least 1, got {value}$"):
        function(value)


@pytest.mark.parametrize(
    "function", [hadamard_matrix, hadamard_factors, hadamard_orders, valid_block_sizes]
)
def test_values_beyond_the_limit_are_refused_at_once(function):
    with pytest.raises(HadamardOrderError, match="must be at most 2147483648, got 1000000"):
        function(10**30)


@pytest.mark.parametrize("function", [hadamard_matrix, hadamard_factors])
@pytest.mark.parametrize(
    ("n", "factorisation", "sizes"),
    [(3, "3 is prime", "none"), (6, "6 = 2 · 3", "2"), (188, "188 = 2^2 · 47", "2, 4")],
)
def test_message_for_an_order_without_construction(function, n, factorisation, sizes):
    with pytest.raises(HadamardOrderError) as caught:
        function(n)
    assert str(caught.value) == (
        f"{function.__name__}: no Hadamard matrix of order n={n} can be constructed "
        f"({factorisation}); {WORKING}: {sizes}"
    )


def test_message_abbreviates_long_lists():
    with pytest.raises(HadamardOrderError) as caught:
        hadamard_matrix(2760)
    listed = "2, 4, 8, 12, 20, 24, 40, 60, 92, 120, 184, 276, ..., 920"
    assert str(caught.value).endswith(f"(2760 = 2^3 · 3 · 5 · 23); {WORKING}: {listed}")


def test_error_is_one_of_ours_and_a_value_error():
    assert issubclass(HadamardOrderError, CorequantError)
    assert issubclass(HadamardOrderError, ValueError)


def test_examples_run():
    results = doctest.testmod(hadamard)
    assert results.failed == 0
    assert results.attempted >= len(hadamard.__all__)


@pytest.mark.parametrize("name", hadamard.__all__)
def test_public_names_are_documented(name):
    text = inspect.getdoc(getattr(hadamard, name))
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"{section}\n{'-' * len(section)}\n" in text
    assert ">>> " in text
    for source in ("Sylvester", "Paley", "Williamson"):
        assert source in text
