from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import corequant as cq

VECTORS = hnp.arrays(np.float64, (3, 24), elements=st.floats(-1e6, 1e6, allow_nan=False))


@given(VECTORS, st.sampled_from([2, 4, 8, 12, 24]))
@example(np.eye(3, 24) * 1.0623873e-161, 2)  # its square has few bits left
def test_bounds(x, b):
    lower, upper = cq.outlier_bounds(x, b)
    truth = np.abs(cq.block_hadamard(x, b)).max(-1)
    slack = 1e-12 * np.abs(x).sum(-1) + np.finfo(np.float64).smallest_subnormal * 24
    assert (lower <= truth + slack).all()
    assert (truth <= upper + slack).all()


@given(VECTORS)
def test_concentration(x):
    delta = cq.mass_concentration(x)
    assert ((delta >= 1 / 24 - 1e-15) & (delta <= 1)).all()
