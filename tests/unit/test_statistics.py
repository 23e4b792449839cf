"""Moments of channels, compiled and plain."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import corequant as cq
from corequant._cpu.loops.moments import channel_moments
from corequant._cpu.statistics import moments


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 16), (7, 37), (8, 64), (3, 9, 100), (500, 48)])
def test_sums_are_those_of_the_plain_loop(dtype, shape):
    x = np.random.default_rng(0).standard_t(3, size=shape).astype(dtype)
    d = shape[-1]
    expected = tuple(np.zeros(d) for _ in range(3))
    channel_moments(x.astype(np.float64).reshape(-1, d), *expected)
    for found, wanted in zip(moments(x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_strided_input_and_other_byte_order():
    x = np.random.default_rng(0).normal(size=(40, 64))
    for other in (x[::2], np.asfortranarray(x), x.astype(">f8"), x[:, ::-1]):
        for found, wanted in zip(
            moments(other), moments(np.ascontiguousarray(other, "=f8")), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("channel", [0, 33])
def test_nothing_is_added_of_what_is_not_finite(bad, channel):
    x = np.ones((10, 34), np.float32)
    stats = cq.ActivationStats(34, gram=True).update(x)
    x[4, channel] = bad
    with pytest.raises(cq.NonFiniteError, match=rf"\(4, {channel}\)"):
        stats.update(x)
    assert stats.count == 10
    assert (stats.mean_abs == 1).all()
