"""Hadamard matrices of powers of two against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from corequant.hadamard import hadamard_matrix


@pytest.mark.parametrize("k", range(12))
def test_powers_of_two_equal_scipy(k):
    ours = hadamard_matrix(2**k)
    np.testing.assert_array_equal(ours, scipy.linalg.hadamard(2**k, dtype=np.int8))


@pytest.mark.parametrize(("n", "core"), [(96, 12), (736, 92)])
def test_sylvester_factor_equals_scipy(n, core):
    expected = np.kron(hadamard_matrix(core), scipy.linalg.hadamard(n // core, dtype=np.int8))
    np.testing.assert_array_equal(hadamard_matrix(n), expected)
