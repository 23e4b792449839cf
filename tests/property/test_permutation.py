from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import corequant as cq

MEANS = hnp.arrays(
    np.float64,
    st.integers(1, 8).map(lambda n: 12 * n),
    elements=st.floats(0, 1e30, allow_nan=False),
)


def literal_massdiff(tokens, b):
    """Follow the algorithm's definition token by token, in exact small integers."""
    d = tokens.shape[1]
    order = sorted(range(d), key=lambda i: (-tokens[:, i].sum(), i))
    blocks = [[c] for c in order[: d // b]]
    for c in order[d // b :]:
        masses = [
            tokens[:, block].sum() + tokens[:, c].sum() if len(block) < b else float("inf")
            for block in blocks
        ]
        blocks[int(np.argmin(masses))].append(c)
    return [c for block in blocks for c in block]


@given(MEANS, st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_method_gives_a_permutation(mean, b):
    for method in (cq.massdiff, cq.zigzag, cq.absmax):
        p = method(mean, b)
        assert sorted(p.tolist()) == list(range(len(mean)))
        np.testing.assert_array_equal(cq.invert_permutation(cq.invert_permutation(p)), p)


@given(
    hnp.arrays(np.int64, (5, 24), elements=st.integers(0, 50)), st.sampled_from([1, 2, 4, 8, 24])
)
def test_massdiff_equals_its_definition(tokens, b):
    p = cq.massdiff(tokens.sum(0).astype(np.float64), b)
    assert p.tolist() == literal_massdiff(tokens, b)
